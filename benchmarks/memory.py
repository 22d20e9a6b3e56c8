"""The peak memory of a step by method: what ``plan`` predicts, what PyTorch's allocator handed out, the process's own peak.

    python benchmarks/memory.py [--dtype float32] [--only gatera peft_lora peft_hira] [--settings "4 x 160"] [--out FILE]

SmolLM2-135M's shape: weights, adapter, moments, gradients and activations of whole optimizer steps, as train_step.py takes
them. ``plan`` predicts nothing of PEFT's methods. The allocator's peak counts tensors; the resident set has the interpreter and
its libraries as well, and what the heap keeps for later. Bytes are not timed: other programs may run beside.
"""

import argparse
import math

import torch
from allocated import peak_bytes
from interleaved import Round, interleaved, machine, write
from train_step import OURS, PEFT, built

from gatera_lightning import BackboneConfig
from gatera_lightning.backbone.loading import prepare_for_training
from gatera_lightning.cost_model.device_memory import Layout, predict_memory
from gatera_lightning.cost_model.step_costs import MicroBatch, build_on_meta, model_sizes, step_costs

SETTINGS = {
    "4 x 160": (4, 160, 8, False),
    "8 x 160, recomputed": (8, 160, 8, True),
    "4 x 160, all targets": (4, 160, 159, False),
    "1 x 640": (1, 640, 32, False),
}
METHODS = ("gatera", "hira", "lora", "dora", *PEFT)


def measuring(method: str, dtype: str, rows: int, tokens: int, targets: int, recomputed: bool) -> Round:
    """Predict and take a step, with what the allocator had out at the worst moment."""
    step, _, model, optimizer = built(method, dtype, 30, 576, 32, (rows, tokens, targets))
    own = BackboneConfig(id="here", gradient_checkpointing=recomputed)
    prepare_for_training(model, own)
    predicted = float("nan")
    if method in OURS:
        planned = build_on_meta(model.config, own, OURS[method], getattr(torch, dtype))
        costs = step_costs(planned, MicroBatch(rows, tokens, rows * targets), recomputed=recomputed)
        predicted = predict_memory(model_sizes(planned), costs, Layout(1, 1)).peak
    step()  # moments are there
    return lambda: {"predicted": predicted, "allocated": peak_bytes(step, model, optimizer)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the backbone"
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    print(machine())
    print(
        "rows x tokens            method              predicted MB   allocated MB   predicted ÷ allocated   resident MB"
    )
    everything = {}
    for setting in args.settings:
        for method in args.only:
            name = f"{setting:<25}{method:<17}"
            sizes = SETTINGS[setting]
            measured = interleaved({name: (measuring, (method, args.dtype, *sizes))}, rounds=1, warmup=0)
            everything |= measured
            predicted, allocated = (measured[name].rounds(figure)[0] for figure in ("predicted", "allocated"))
            told = (
                ("–", "–")
                if math.isnan(predicted)
                else (f"{predicted / 1e6:.0f}", f"{predicted / allocated:.2f}")
            )
            line = f"{name}{told[0]:>15}{allocated / 1e6:>15.0f}{told[1]:>24}"
            print(f"{line}{measured[name].peak_bytes / 1e6:>14.0f}", flush=True)
    settings = vars(args) | {"settings": list(args.settings), "only": list(args.only)}
    write(args.out, settings, everything)


if __name__ == "__main__":
    main()
