"""What ``plan`` predicts of a step's peak memory, beside what PyTorch's allocator handed out and the process's own peak.

    python benchmarks/memory.py [--dtype float32] [--out results/memory.json]

SmolLM2-135M's shape: weights, adapter, moments, gradients and activations of whole optimizer steps. The allocator's peak counts
tensors; the resident set has the interpreter and its libraries as well, and what the heap keeps for later.
"""

import argparse

import torch
from allocated import peak_bytes
from interleaved import Round, interleaved, machine, write
from torch import nn
from train_step import OURS, backbone, rows, with_gatera

from gatera_lightning import BackboneConfig
from gatera_lightning.backbone import ready_for_training
from gatera_lightning.commands.plan import Layout, predict_memory
from gatera_lightning.costs import MicroBatch, build_on_meta, model_sizes, step_costs

SETTINGS = {
    "4 x 160": (4, 160, 8, False),
    "8 x 160, recomputed": (8, 160, 8, True),
    "4 x 160, all targets": (4, 160, 159, False),
    "1 x 640": (1, 640, 32, False),
}
METHODS = ("gatera", "hira", "lora", "dora")


def measuring(method: str, dtype: str, count: int, tokens: int, targets: int, recomputed: bool) -> Round:
    """Predict and take a step, with what the allocator had out at the worst moment."""
    own = BackboneConfig(id="here", gradient_checkpointing=recomputed)
    model = backbone(dtype, 30, 576)
    ids, labels = rows(count, tokens, targets)
    loss_of = with_gatera(model, OURS[method], 32, ids, labels, less_kept=True)
    ready_for_training(model, own)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, foreach=False)
    planned = build_on_meta(model.config, own, OURS[method], getattr(torch, dtype))
    batch = MicroBatch(count, tokens, count * targets)
    predicted = predict_memory(model_sizes(planned), step_costs(planned, batch, recomputed=recomputed), Layout(1, 1))

    def step() -> None:
        loss_of().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()

    def once() -> dict[str, float]:
        return {"predicted": predicted.peak, "allocated": peak_bytes(step, model, optimizer)}

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the backbone")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    print(machine())
    print("rows x tokens            method   predicted MB   allocated MB   predicted ÷ allocated   resident MB")
    everything = {}
    for setting, sizes in SETTINGS.items():
        for method in args.only:
            name = f"{setting:<25}{method:<7}"
            measured = interleaved({name: (measuring, (method, args.dtype, *sizes))}, rounds=1, warmup=0)
            everything |= measured
            predicted, allocated = (measured[name].rounds(figure)[0] for figure in ("predicted", "allocated"))
            line = f"{name}{predicted / 1e6:>15.0f}{allocated / 1e6:>15.0f}{predicted / allocated:>24.2f}"
            print(f"{line}{measured[name].peak_bytes / 1e6:>14.0f}", flush=True)
    write(args.out, vars(args), everything)


if __name__ == "__main__":
    main()
