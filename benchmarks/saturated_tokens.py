"""What it costs and saves to leave out products of tokens with decided gates: SmolLM2-135M, rows and settings of gate_study.py.

    GATERA_DATA=… python benchmarks/decided_tokens.py arc 0.1:-2:10 0.1:0:10 --out results/decided_tokens.jsonl

Each setting ``λ:gate_bias:gate_lr_multiplier`` is trained twice from one seed, exactly and with ``skip_below`` 0.1 and
``merge_above`` 0.9, and both adapters are read exactly on the held-out rows. Then, with the exactly trained adapter and several
thresholds G (skip below G, merge above 1 − G):

- training: how far the loss of a batch is off, and the cosine between its gradient and the exact one, of the updates and of
  the gates; means over four held-out batches, and the worst;
- decoding: how many of 32 held-out prompts are answered by other tokens than exactly, greedily, at most 16 tokens each.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gate_study import STEPS, figures, read_held_out, trained
from torch import Tensor

from gatera_lightning import GateRAModule
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, generate

THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
BATCHES, PROMPTS = 4, 32


def set_thresholds(module: GateRAModule, gate: float) -> None:
    for layer in adapted_linears(module.model).values():
        layer.gate.set_thresholds(gate, 1 - gate)


def gradient(module: GateRAModule, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Of a batch's task loss; the gradient of the updates and that of the gates, each as one vector."""
    module.model.train()
    module.model.zero_grad(set_to_none=True)  # training leaves the gradient of its last step
    loss, _ = module.summed_task_loss(batch)
    loss = loss / max(1, batch["step_supervised_tokens"])
    loss.backward()
    found = {
        name: p.grad.double().flatten()
        for name, p in adapter_parameters(module.model).items()
        if p.grad is not None
    }
    parts = {
        part: torch.cat([gradient for name, gradient in found.items() if f".{part}." in name])
        for part in ("update", "gate")
    }
    return float(loss), parts


def off_in_training(module: GateRAModule, batches: list[Batch]) -> list[dict[str, float]]:
    """By threshold, how far loss and gradient are off."""
    exact = [gradient(module, batch) for batch in batches]
    told = []
    for gate in THRESHOLDS:
        set_thresholds(module, gate)
        losses, cosines = [], {"update": [], "gate": []}
        for batch, (loss, parts) in zip(batches, exact, strict=True):
            other, other_parts = gradient(module, batch)
            losses.append(abs(other - loss))
            for part, cosine in cosines.items():
                cosine.append(float(F.cosine_similarity(parts[part], other_parts[part], dim=0)))
        set_thresholds(module, 0.0)
        found = {"gate": gate, "loss_off": statistics.mean(losses), "loss_off_worst": max(losses)}
        for part, cosine in cosines.items():
            found |= {f"{part}_cosine": statistics.mean(cosine), f"{part}_cosine_worst": min(cosine)}
        told.append(found)
    return told


def off_in_decoding(module: GateRAModule, batches: list[Batch]) -> dict[float, float]:
    """By threshold, the share of prompts that are answered otherwise."""
    module.model.eval()
    prompts = [
        row[: int(answer.int().argmax())].tolist()
        for batch in batches
        for row, answer in zip(batch["input_ids"], batch["response_mask"], strict=True)
    ][:PROMPTS]

    def answers(gate: float) -> list[list[int]]:
        config = DecodingConfig(skip_below=gate, merge_above=1 - gate)
        alone = [
            collate_prompts([prompt], [0], pad_id=2, eos_id=2) for prompt in prompts
        ]  # a row at a time, as one chats
        return [generate(module.model, prompt, config)[0].tolist() for prompt in alone]

    exact = answers(0.0)
    return {
        gate: statistics.mean(a != b for a, b in zip(answers(gate), exact, strict=True))
        for gate in THRESHOLDS
    }


def study(task: str, setting: str, seed: int) -> dict[str, Any]:
    """Train twice, compare, and read."""
    told: dict[str, Any] = {"task": task, "setting": setting, "seed": seed}
    for name, thresholds in (("skipping", {"skip_below": 0.1, "merge_above": 0.9}), ("exact", {})):
        module, data, cpu = trained(task, setting, seed, **thresholds)
        set_thresholds(module, 0.0)
        found = read_held_out(module, data)
        shares = {key: value for key, value in figures(found).items() if key in ("closed", "open")}
        told[name] = {"cpu_seconds": cpu, "nats": found["nats"]} | shares
    batches = held_out(data)
    return told | {"training": off_in_training(module, batches), "decoding": off_in_decoding(module, batches)}


def held_out(data: SupervisedDataModule) -> list[Batch]:
    batches: list[Batch] = []
    for batch in data.val_dataloader():
        batches.append(batch)
        batch["step_supervised_tokens"] = int((batch["labels"] >= 0).sum())
    return batches[:BATCHES]


def show(told: dict[str, Any]) -> None:
    for name in ("exact", "skipping"):
        one = told[name]
        line = f"{told['task']} {told['setting']} seed {told['seed']}, trained {name}: {one['nats']:.4f} nats held out"
        print(f"{line}, {one['cpu_seconds']:.0f} CPU s; closed {one['closed']:.0%}, open {one['open']:.0%}")
    print("| G | loss off, mean (worst) | cosine of the updates' gradient | of the gates' | other answers |")
    print("|---|---|---|---|---|")
    for row, changed in zip(told["training"], told["decoding"].values(), strict=True):
        off = f"{row['loss_off']:.4f} ({row['loss_off_worst']:.4f})"
        cosines = [
            f"{row[f'{part}_cosine']:.4f} ({row[f'{part}_cosine_worst']:.4f})" for part in ("update", "gate")
        ]
        print(f"| {row['gate']:g} | {off} | {' | '.join(cosines)} | {changed:.0%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=STEPS)
    parser.add_argument("settings", nargs="+", metavar="λ:BIAS:MULTIPLIER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, help="a line of JSON is added to this file for each setting and seed"
    )
    args = parser.parse_args()
    if "GATERA_DATA" not in os.environ:
        sys.exit("set GATERA_DATA to the folder that holds commonsense/ and dialogue/")
    for setting in args.settings:
        for seed in args.seeds:
            told = study(args.task, setting, seed)
            show(told)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as out:
                    out.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
