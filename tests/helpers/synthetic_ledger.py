"""A ledger of generated losses: each method differs from the untrained model by a known amount."""

import numpy as np

from benchmarks.quality.families import MEASURED
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import Run

EFFECTS = {"lora": -1.0, "hira": -1.2, "gatera": -1.2, "gatera_shuffled": -1.2}
"""Change of the loss per token of the trained family, by method."""

FORGOTTEN = {"lora": 0.5, "hira": 0.3, "gatera": 0.1, "gatera_shuffled": 0.1}
"""Change of the loss per token of the other families."""

TOKENS = 5


def synthetic_ledger(family="commonsense", seeds=(1, 2, 3)):
    """Return the untrained model's lines, three rates of each method, and its tested runs."""
    rng = np.random.default_rng(0)
    lines, base = [], {}
    for other in MEASURED.values():
        base[other.name] = rng.normal(20, 3, other.test_rows).round(4)
        test = {"sums": base[other.name].tolist(), "tokens": [TOKENS] * other.test_rows}
        retention = {name: values[: other.retention_rows] for name, values in test.items()}
        test |= {"correct": "01" * (other.test_rows // 2)} if other.has_candidates else {}
        lines.append(
            _line(
                Run(other.name, "untrained", "untrained", None, 0),
                test=test,
                retention=retention,
                validation=4.0,
            )
        )
    for name, effect in EFFECTS.items():
        for rate, loss in zip(METHODS[name].rates, (2.5, 2.0, 2.2), strict=False):
            lines.append(_line(Run(family, "rates", name, rate, 0), validation=loss))
        rate = METHODS[METHODS[name].rate_of or name].rates[1]
        for seed in seeds:
            noise = rng.normal(0, 0.2, MEASURED[family].test_rows)
            sums = base[family] + TOKENS * effect + noise
            others = {
                other.name: base[other.name][: other.retention_rows] + TOKENS * FORGOTTEN[name]
                for other in MEASURED.values()
                if other.name != family
            }
            lines.append(
                _line(
                    Run(family, "seeds", name, rate, seed),
                    test={"sums": sums.round(4).tolist(), "correct": "1" * len(sums)},
                    retention={other: {"sums": found.round(4).tolist()} for other, found in others.items()},
                    trajectory=[
                        _point(family, base, 8, effect / 2, FORGOTTEN[name] / 4),
                        _point(family, base, 32, effect, FORGOTTEN[name]),
                    ],
                    gates=None if name in ("lora", "hira") else GATES,
                )
            )
    return lines


GATES = {"mean": 0.6, "closed": 0.1, "open": 0.2, "tokens_std": 0.05, "layers_std": 0.15}


def _point(family, base, step, effect, forgotten):
    def loss(name, change):
        rows = MEASURED[name].probe_rows
        return float(base[name][:rows].sum() / (TOKENS * rows) + change)

    others = {other: loss(other, forgotten) for other in MEASURED if other != family}
    return {"step": step, "heldout": loss(family, effect), "retention": others}


def _line(run, **measured):
    cost = {"cpu_seconds": 60.0, "cpu_seconds_per_step": 1.5, "peak_bytes": 2 * 10**9, "adapter_bytes": 10**7}
    return vars(run) | {"cost": cost, "environment": {"commit": "abc", "machine": "a machine"}} | measured
