"""Do gates saturate, and do they separate prompt from response? By λ, gate bias and gate learning rate.

    GATERA_DATA=… python -m benchmarks.gate_study arc 0:0:1 0.1:0:10 0.1:-2:10 --seeds 0 1 \\
        --out results/gate_study.jsonl
    GATERA_DATA=… python -m benchmarks.gate_study dialogue hira 0.1:0:10
    python -m benchmarks.gate_study --show --out results/gate_study.jsonl

GateRA on SmolLM2-135M and real examples. A run is ``λ:bias:lr_multiplier`` of the gate, or ``hira`` for the
same update without a gate. Rank 16 on q, k, v, up, down; learning rate 1e-2, linear decay after 10 warm-up
steps, clipping at 1; the response is supervised.

arc        ARC-Easy, ARC-Challenge and the first 2,000 examples of OpenBookQA; 80 steps of 8 examples; 200
           examples in the validation split
dialogue   ConvAI2 (valid_self_original.shared.txt), two turns of history; 40 steps of 6 examples; at least
           120 examples in the validation split

Measured on the validation split: the cross-entropy loss (nats per token), and every gate of every non-padding
token. A seed also draws the validation split, so only runs with the same seed can be compared. Runs in
``--out`` are not repeated.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.harness.arguments import build_parser, require_data
from benchmarks.harness.fitting import CONVAI2, SMOLLM2, arc_data, bare_trainer
from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig, record_gates
from gatera_lightning.adapters.gates import GateConfig, NoGateConfig, TokenGateConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.datamodules import DialogueDataModule
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.statistics import (
    PHASES,
    GateStatistics,
    counted_tokens,
    statistics_from_counts,
)
from gatera_lightning.objectives.next_token import summed_cross_entropy

STEPS = {"arc": 80, "dialogue": 40}


def load_data(task: str, seed: int) -> SupervisedDataModule:
    """Return the data of one task; the seed also draws the validation split."""
    if task == "arc":
        return arc_data(validation=200, test=[], batch_size=8, eval_batch_size=16, seed=seed)
    return DialogueDataModule(
        template="plain",
        train_on="response",
        split_by="persona",
        max_history_turns=2,
        train=[f"{CONVAI2}[:66]"],
        validation=120,
        test=[],
        max_length=256,
        batch_size=6,
        eval_batch_size=8,
        seed=seed,
    )


def train(
    task: str, setting: str, seed: int, **thresholds: float
) -> tuple[GateRAModule, SupervisedDataModule, float]:
    """Train once.

    Args:
        task: arc or dialogue.
        setting: ``λ:bias:lr_multiplier``, or ``hira``.
        seed: Draws the adapter, the examples of each step and the validation split.
        thresholds: ``skip_below`` and ``merge_above`` of the gate.

    Returns:
        The trained module, its data, and the CPU seconds of training.
    """
    L.seed_everything(seed, verbose=False)
    gate: GateConfig = NoGateConfig()
    if setting != "hira":
        weight, bias, multiplier = map(float, setting.split(":"))
        gate = TokenGateConfig(bias=bias, entropy_weight=weight, lr_multiplier=multiplier, **thresholds)
    backbone = BackboneConfig(id=SMOLLM2)
    module = GateRAModule(
        backbone=backbone,
        adapter=AdapterConfig(update="hira", gate=gate, rank=16),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=10),
    )
    data = load_data(task, seed)
    data.connect(load_tokenizer(backbone))
    trainer = bare_trainer(accelerator="cpu", max_steps=STEPS[task])
    module.configure_model()  # loading the backbone is not a part of training
    cpu = time.process_time()
    trainer.fit(module, datamodule=data)
    return module, data, time.process_time() - cpu


def run(task: str, setting: str, seed: int) -> dict[str, Any]:
    """Train once, then measure on the validation split."""
    module, data, cpu = train(task, setting, seed)
    result = {"task": task, "setting": setting, "seed": seed, "train_cpu_seconds": cpu}
    return result | validate(module, data) | {"torch": torch.__version__, "dtype": str(module.model.dtype)}


@torch.no_grad()
def validate(module: GateRAModule, data: SupervisedDataModule) -> dict[str, Any]:
    """Return the cross-entropy loss (nats per token), and the counts and sums of all gates."""
    module.model.eval()
    loss, supervised, statistics, names = 0.0, 0, None, []
    for batch in data.val_dataloader():
        with record_gates(module.model) as gates:
            found = module(batch)
        loss += float(summed_cross_entropy(found.logits, found.labels))
        supervised += len(found.labels)
        z = gates.stacked(batch["attention_mask"])  # (modules, batch, tokens)
        if z is not None:
            statistics, names = statistics or GateStatistics(len(z)), gates.names
            statistics.update(z, counted_tokens(batch), batch["response_mask"])
    result: dict[str, Any] = {"nats": loss / supervised, "targets": supervised}
    if statistics is not None:
        bins, sums = statistics.compute()
        result |= {"modules": names, "bins": bins.tolist(), "sums": sums.tolist()}
    return result


def gate_figures(result: dict[str, Any]) -> dict[str, float]:
    """Return what the table shows of a run with gates.

    ``AUROC`` is the probability that the gate of a response token is above that of a prompt token in the same
    module (0.5 for no difference; ties count half), as the mean over modules. ``farthest`` is the distance
    from 0.5 of the most selective module. ``between modules`` is the share of the variance of g that is
    between modules rather than between the tokens of a module.
    """
    bins = torch.tensor(result["bins"]).double()  # (phases, modules, 50)
    sums = torch.tensor(result["sums"])  # (3, phases, modules)
    _, closed, opened, _ = statistics_from_counts(bins.sum((0, 1)), sums.sum((1, 2))).tolist()
    figures = {"closed": closed, "open": opened, "saturated": closed + opened}
    means = statistics_from_counts(bins.sum(1), sums.sum(2))[:, 0].tolist()
    figures |= dict(zip(PHASES, means, strict=True))
    tokens = bins.sum((0, 2))  # (modules,), the same for all
    means, squares = sums[0].sum(0) / tokens, sums[2].sum(0) / tokens
    figures["between modules"] = float(means.var(unbiased=False) / (squares.mean() - means.mean() ** 2))
    by_module = auroc(bins)
    return figures | {"AUROC": float(by_module.mean()), "farthest": float((by_module - 0.5).abs().max())}


def auroc(bins: torch.Tensor) -> torch.Tensor:
    """Return how often the gate of a response token is above that of a prompt token, by module.

    Args:
        bins: Counts of gates, (phases, modules, 50).

    Returns:
        (modules,)
    """
    share = bins / bins.sum(-1, keepdim=True)
    below = share[0].cumsum(-1) - share[0] / 2  # prompt gates below a bin, and half of those in it
    return (share[1] * below).sum(-1)


def describe_modules(result: dict[str, Any]) -> str:
    """Return mean gates by projection type and by part of the model, and how many modules separate phases."""
    bins, sums = torch.tensor(result["bins"]), torch.tensor(result["sums"])
    modules = [GatedModule(name) for name in result["modules"]]
    depth = 1 + max(module.layer for module in modules)

    def mean(indices: list[int]) -> str:
        found = statistics_from_counts(bins[:, indices].sum((0, 1)), sums[:, :, indices].sum((1, 2)))
        return f"{found[0]:.2f}"

    parts = []
    for projection in dict.fromkeys(module.projection for module in modules):
        indices = [i for i, module in enumerate(modules) if module.projection == projection]
        parts.append(f"{projection.removesuffix('_proj')} {mean(indices)}")
    for block in ("self_attn", "mlp"):
        inside = [i for i, module in enumerate(modules) if f".{block}." in module.path]
        thirds = [mean([i for i in inside if modules[i].layer * 3 // depth == third]) for third in range(3)]
        parts.append(f"{block} by thirds of the layers {' / '.join(thirds)}")
    by_module = auroc(bins.double())
    lower, higher = int((by_module < 0.4).sum()), int((by_module > 0.6).sum())
    parts.append(f"response below prompt over 60 % of the time in {lower} modules, above in {higher}")
    return ", ".join(parts)


def print_table(results: list[dict[str, Any]]) -> None:
    """Print one line per run."""
    columns = (
        *("saturated", "closed", "open", "prompt", "response"),
        *("AUROC", "farthest", "between modules"),
    )
    print(f"| task | λ:bias:gate lr | seed | nats | {' | '.join(columns)} | mean gate by projection type |")
    print("|" + "---|" * (5 + len(columns)))
    for result in results:
        figures = gate_figures(result) if "bins" in result else {}
        cells = [f"{result['nats']:.3f}", *(f"{figures[name]:.3f}" if figures else "" for name in columns)]
        modules = describe_modules(result) if figures else ""
        print(
            f"| {result['task']} | {result['setting']} | {result['seed']} | {' | '.join(cells)} | {modules} |"
        )


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("task", nargs="?", choices=STEPS, default="arc")
    parser.add_argument("settings", nargs="*", default=[], metavar="λ:BIAS:MULTIPLIER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--show", action="store_true", help="only print the table of the results in --out")
    parser.add_argument("--out", type=Path, default=Path("gate_study.jsonl"))
    args = parser.parse_args()
    results = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.show:
        return print_table(results)
    require_data()
    for setting in args.settings:
        for seed in args.seeds:
            if any((r["task"], r["setting"], r["seed"]) == (args.task, setting, seed) for r in results):
                continue
            results.append(run(args.task, setting, seed))
            with args.out.open("a") as out:
                out.write(json.dumps(results[-1]) + "\n")
            print_table(results[-1:])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
