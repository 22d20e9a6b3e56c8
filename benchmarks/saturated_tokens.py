"""What it saves and costs to skip matmuls of tokens with saturated gates.

    GATERA_DATA=… python -m benchmarks.saturated_tokens arc 0.1:-2:10 0.1:0:10 \\
        --out results/saturated_tokens.jsonl

SmolLM2-135M with the data and settings of gate_study.py. Each setting ``λ:bias:lr_multiplier`` of the gate
is trained twice from one seed, exactly and with ``skip_below`` 0.1 and ``merge_above`` 0.9, and both
adapters are evaluated exactly on the validation split. Then, with the exactly trained adapter and several
thresholds G (skip below G, merge above 1 − G):

- training: the error of a batch's loss, and the cosine between its gradient and the exact one, of the updates
  and of the gates; the mean over four validation batches, and the worst;
- decoding: how many of 32 validation prompts get an answer other than the exact one (greedy, at most 16
tokens).
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gate_study import STEPS, gate_figures, train, validate
from benchmarks.harness.arguments import build_parser, require_data
from gatera_lightning import DecodingConfig, GateRAModule, adapter_parameters
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import generate
from gatera_lightning.objectives.next_token import summed_next_token_loss

THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
BATCHES, PROMPTS = 4, 32


def set_thresholds(module: GateRAModule, threshold: float) -> None:
    """Skip below the threshold and merge above 1 − threshold; 0 is exact."""
    for layer in adapted_linears(module.model).values():
        layer.gate.set_thresholds(threshold, 1 - threshold)


def loss_and_gradients(module: GateRAModule, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    """Return a batch's loss, and the gradients of the updates and of the gates, each as one vector."""
    module.model.train()
    module.model.zero_grad(set_to_none=True)  # training leaves the gradients of its last step
    loss = summed_next_token_loss(module.model, batch) / max(1, batch["step_supervised_tokens"])
    loss.backward()
    gradients = {
        name: p.grad.double().flatten()
        for name, p in adapter_parameters(module.model).items()
        if p.grad is not None
    }
    parts = {
        part: torch.cat([gradient for name, gradient in gradients.items() if f".{part}." in name])
        for part in ("update", "gate")
    }
    return float(loss.detach()), parts


def training_errors(module: GateRAModule, batches: list[Batch]) -> list[dict[str, float]]:
    """Return the errors of loss and gradients for each threshold."""
    exact = [loss_and_gradients(module, batch) for batch in batches]
    results = []
    for threshold in THRESHOLDS:
        set_thresholds(module, threshold)
        errors, cosines = [], {"update": [], "gate": []}
        for batch, (loss, parts) in zip(batches, exact, strict=True):
            other, other_parts = loss_and_gradients(module, batch)
            errors.append(abs(other - loss))
            for part, values in cosines.items():
                values.append(float(F.cosine_similarity(parts[part], other_parts[part], dim=0)))
        set_thresholds(module, 0.0)
        result = {"gate": threshold, "loss_off": statistics.mean(errors), "loss_off_worst": max(errors)}
        for part, values in cosines.items():
            result |= {f"{part}_cosine": statistics.mean(values), f"{part}_cosine_worst": min(values)}
        results.append(result)
    return results


def changed_answers(module: GateRAModule, batches: list[Batch]) -> dict[float, float]:
    """Return, for each threshold, the share of prompts whose answer changes."""
    module.model.eval()
    prompts = [
        ids[: int(response.int().argmax())].tolist()
        for batch in batches
        for ids, response in zip(batch["input_ids"], batch["response_mask"], strict=True)
    ][:PROMPTS]
    # One prompt at a time, as in a chat session.
    prompt_batches = [collate_prompts([prompt], [0], pad_id=2, eos_id=2) for prompt in prompts]

    def answers(threshold: float) -> list[list[int]]:
        config = DecodingConfig(skip_below=threshold, merge_above=1 - threshold)
        return [generate(module.model, batch, config)[0].tolist() for batch in prompt_batches]

    exact = answers(0.0)
    return {
        threshold: statistics.mean(a != b for a, b in zip(answers(threshold), exact, strict=True))
        for threshold in THRESHOLDS
    }


def study(task: str, setting: str, seed: int) -> dict[str, Any]:
    """Train twice, evaluate both adapters, and measure the errors of each threshold."""
    result: dict[str, Any] = {"task": task, "setting": setting, "seed": seed}
    for name, thresholds in (("skipping", {"skip_below": 0.1, "merge_above": 0.9}), ("exact", {})):
        module, data, cpu = train(task, setting, seed, **thresholds)
        set_thresholds(module, 0.0)
        found = validate(module, data)
        shares = {key: value for key, value in gate_figures(found).items() if key in ("closed", "open")}
        result[name] = {"cpu_seconds": cpu, "nats": found["nats"]} | shares
    batches = validation_batches(data)
    return result | {
        "training": training_errors(module, batches),
        "decoding": changed_answers(module, batches),
    }


def validation_batches(data: SupervisedDataModule) -> list[Batch]:
    """Return the first batches of the validation split, as optimizer steps of one batch."""
    batches: list[Batch] = []
    for batch in data.val_dataloader():
        batch["step_supervised_tokens"] = int((batch["labels"] >= 0).sum())
        batches.append(batch)
    return batches[:BATCHES]


def print_result(result: dict[str, Any]) -> None:
    """Print both trainings, and a table of the thresholds."""
    for name in ("exact", "skipping"):
        one = result[name]
        run = f"{result['task']} {result['setting']} seed {result['seed']}, trained {name}"
        shares = f"closed {one['closed']:.0%}, open {one['open']:.0%}"
        print(f"{run}: {one['nats']:.4f} nats per token, {one['cpu_seconds']:.0f} CPU s; {shares}")
    print(
        "| G | error of the loss, mean (worst) | cosine of the updates' gradient "
        "| of the gates' | other answers |"
    )
    print("|---|---|---|---|---|")
    for row, changed in zip(result["training"], result["decoding"].values(), strict=True):
        error = f"{row['loss_off']:.4f} ({row['loss_off_worst']:.4f})"
        cosines = [
            f"{row[f'{part}_cosine']:.4f} ({row[f'{part}_cosine_worst']:.4f})" for part in ("update", "gate")
        ]
        print(f"| {row['gate']:g} | {error} | {' | '.join(cosines)} | {changed:.0%} |", flush=True)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("task", choices=STEPS)
    parser.add_argument("settings", nargs="+", metavar="λ:BIAS:MULTIPLIER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="a JSON Lines file, to which each result is appended")
    args = parser.parse_args()
    require_data()
    for setting in args.settings:
        for seed in args.seeds:
            result = study(args.task, setting, seed)
            print_result(result)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                with args.out.open("a") as out:
                    out.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
