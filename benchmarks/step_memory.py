"""The peak memory of a step by method: predicted by ``estimate``, allocated by PyTorch, and of the process.

    python -m benchmarks.step_memory [--dtype float32] [--only gatera peft_lora peft_hira] \\
        [--settings "4 x 160"] [--quantization nf4] [--out FILE]

SmolLM2-135M's shape: weights, adapter, moments, gradients and activations of the optimizer steps of
train_step.py. ``estimate`` predicts nothing for PEFT's methods. The allocated memory counts tensors; the
memory of the process includes the interpreter, its libraries, and freed memory in the heap. No time is
measured, so other programs may run at the same time.
"""

import math
from typing import Any, get_args

import torch

from benchmarks.harness.allocator import peak_allocated_bytes
from benchmarks.harness.arguments import add_dtype, build_parser
from benchmarks.harness.interleaving import Round, run_interleaved, write_results
from benchmarks.harness.machine import describe_machine
from benchmarks.harness.steps import ADAPTERS, PEFT, StepSettings, build_contender
from gatera_lightning import BackboneConfig
from gatera_lightning.backbone.config import Quantization
from gatera_lightning.backbone.loading import prepare_for_training
from gatera_lightning.cost_model.device_memory import Layout, predict_memory
from gatera_lightning.cost_model.step_costs import MicroBatch, build_on_meta, model_sizes, step_costs

SETTINGS = {
    "4 x 160": (4, 160, 8, False),
    "8 x 160, checkpointed": (8, 160, 8, True),
    "4 x 160, all supervised": (4, 160, 159, False),
    "1 x 640": (1, 640, 32, False),
}
"""Examples, tokens and supervised tokens of each, and whether decoder layers use gradient checkpointing."""

METHODS = ("gatera", "hira", "lora", "dora", *PEFT)


def measured_step(method: str, settings: StepSettings, checkpointed: bool) -> Round:
    """Return a step whose figures are its predicted and its measured peak memory in bytes."""
    contender = build_contender(method, settings)
    model = contender.model
    quantization: Any = settings.quantization
    backbone = BackboneConfig(id="random", gradient_checkpointing=checkpointed, quantization=quantization)
    prepare_for_training(model, backbone)
    predicted = float("nan")
    if method in ADAPTERS:
        estimated = build_on_meta(model.config, backbone, ADAPTERS[method], getattr(torch, settings.dtype))
        batch = MicroBatch(settings.examples, settings.tokens, settings.examples * settings.supervised)
        costs = step_costs(estimated, batch, recomputed=checkpointed)
        predicted = predict_memory(model_sizes(estimated), costs, Layout(1, 1)).peak
    contender.step()  # creates the optimizer's moments
    return lambda: {
        "predicted": predicted,
        "allocated": peak_allocated_bytes(contender.step, model, contender.optimizer),
    }


def main() -> None:
    parser = build_parser(__doc__)
    add_dtype(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--quantization", choices=get_args(Quantization), default="none")
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    print(describe_machine())
    print(
        f"{'examples x tokens':<25}{'method':<17}"
        "   predicted MB   allocated MB   predicted ÷ allocated   process MB"
    )
    everything = {}
    for name in args.settings:
        examples, tokens, supervised, checkpointed = SETTINGS[name]
        settings = StepSettings(
            args.dtype,
            args.layers,
            examples=examples,
            tokens=tokens,
            supervised=supervised,
            quantization=args.quantization,
        )
        for method in args.only:
            label = f"{name:<25}{method:<17}"
            contenders = {label: (measured_step, (method, settings, checkpointed))}
            one = run_interleaved(contenders, rounds=1, warmup=0)[label]
            everything[label] = one
            predicted, allocated = (one.by_round(figure)[0] for figure in ("predicted", "allocated"))
            known = not math.isnan(predicted)
            megabytes, ratio = (
                (f"{predicted / 1e6:.0f}", f"{predicted / allocated:.2f}") if known else ("–", "–")
            )
            print(
                f"{label}{megabytes:>15}{allocated / 1e6:>15.0f}{ratio:>24}{one.peak_bytes / 1e6:>13.0f}",
                flush=True,
            )
    write_results(
        args.out, vars(args) | {"settings": list(args.settings), "only": list(args.only)}, everything
    )


if __name__ == "__main__":
    main()
