"""The gate report: gate profiles of one or two adapters, as JSON data or as a self-contained HTML page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gatera_lightning.errors import checks_arguments
from gatera_lightning.gate_analysis.probing import GateProfile
from gatera_lightning.gate_analysis.statistics import (
    CLOSED_BELOW,
    OPEN_FROM,
    PHASES,
    statistics_from_gates,
)
from gatera_lightning.gate_analysis.token_labels import token_labels

FORMAT_VERSION = 1
_NUM_EXTREMES = 12
_CONTEXT = 6  # tokens on either side


@dataclass(frozen=True)
class AdapterProfile:
    """The gate profile of an adapter, and a description of the adapter."""

    source: dict[str, str]
    profile: GateProfile


@checks_arguments
def build_report(
    adapters: Sequence[AdapterProfile], tokenizer: PreTrainedTokenizerBase, computed_from: dict[str, str]
) -> dict[str, Any]:
    """Collect everything the page shows.

    Args:
        adapters: Profiles of one or more adapters on the same texts.
        tokenizer: The tokenizer of the texts.
        computed_from: What the report was computed from, shown in its header.

    Returns:
        Data that ``json`` can write. ``gates[text]`` of an adapter is (modules, tokens); its ``statistics``
        cover all texts together.
    """
    texts = adapters[0].profile.texts
    labels = [token_labels(tokenizer, text.token_ids) for text in texts]
    return {
        "format_version": FORMAT_VERSION,
        "computed_from": computed_from,
        "closed_below": CLOSED_BELOW,
        "open_from": OPEN_FROM,
        "texts": [
            {
                "title": text.title,
                "tokens": label,
                "ids": text.token_ids,
                "prompt": text.prompt_length,
                "decoded": text.generated,
            }
            for text, label in zip(texts, labels, strict=True)
        ],
        "adapters": [
            {
                "source": adapter.source,
                "modules": [
                    {"path": module.path, "layer": module.layer, "name": module.projection}
                    for module in adapter.profile.modules
                ],
                "gates": [
                    [[round(float(g), 7) for g in module] for module in gates]
                    for gates in adapter.profile.gates
                ],
                "phases": list(adapter.profile.phases),
                "statistics": _statistics(adapter.profile),
                "extremes": _extremes(adapter.profile, labels),
            }
            for adapter in adapters
        ],
    }


@checks_arguments
def render_page(report: dict[str, Any]) -> str:
    """Render a report as one self-contained HTML page.

    The page receives all texts as JSON data and shows them as text: nothing in them is interpreted as HTML
    or script.

    Raises:
        ValueError: The report has a number that is not finite, which JSON does not have.
    """
    folder = resources.files("gatera_lightning.gate_analysis").joinpath("report_page")
    data = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    page = folder.joinpath("page.html").read_text(encoding="utf-8")
    for name in ("style.css", "charts.js", "sections.js"):
        page = page.replace(f"{{{{{name}}}}}", folder.joinpath(name).read_text(encoding="utf-8"))
    return page.replace("{{report}}", data)


def _statistics(profile: GateProfile) -> dict[str, Any]:
    """Statistics of each phase, of each projection type by layer, and of each token position."""
    found: dict[str, Any] = {}
    projections = list(dict.fromkeys(module.projection for module in profile.modules))
    layers = sorted({module.layer for module in profile.modules})
    for phase in dict.fromkeys((*PHASES, *profile.phases)):  # always with "response", given or generated
        gates = profile.of_phase(phase)
        found[phase] = statistics_from_gates(gates) | {"layers": layers}
        found[phase]["mean_by_layer"] = {
            projection: [
                _mean(gates[[m.projection == projection and m.layer == layer for m in profile.modules]])
                for layer in layers
            ]
            for projection in projections
        }
    means = [gates.mean(0, dtype=float) for gates in profile.gates]  # (tokens,) each
    longest = max(map(len, means))
    # At each position, the mean over the texts that are long enough.
    found["mean_by_position"] = [_mean(np.array([m[p] for m in means if p < len(m)])) for p in range(longest)]
    return found


def _mean(gates: np.ndarray) -> float | None:
    return float(gates.mean(dtype=float)) if gates.size else None


def _extremes(profile: GateProfile, labels: list[list[str]]) -> dict[str, list[dict[str, Any]]]:
    """The tokens with the lowest and the highest mean gate over all modules, with their context."""
    means = [
        (float(mean), text, position)
        for text, gates in enumerate(profile.gates)
        for position, mean in enumerate(gates.mean(0, dtype=float))
    ]
    means.sort()

    def entry(mean: float, text: int, position: int) -> dict[str, Any]:
        tokens = labels[text]
        return {
            "mean": round(mean, 7),
            "text": text,
            "position": position,
            "before": "".join(tokens[max(0, position - _CONTEXT) : position]),
            "token": tokens[position],
            "after": "".join(tokens[position + 1 : position + 1 + _CONTEXT]),
        }

    return {
        "closed": [entry(*found) for found in means[:_NUM_EXTREMES]],
        "open": [entry(*found) for found in reversed(means[-_NUM_EXTREMES:])],
    }
