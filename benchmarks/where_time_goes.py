"""Where a training step's seconds go: large products, attention, all else. What no change of code around them can take away.

    python benchmarks/where_time_goes.py [--dtype float32] [--rounds 3] [--only frozen gatera peft_lora]

The steps of train_step.py, each under PyTorch's profiler; seconds of kernels, medians over the rounds. ``products`` are matrix
products, and GFLOP/s their rate: near the processor's peak, only fewer products would take less time.
"""

import argparse
import statistics
from typing import Any

import torch
from interleaved import Round, interleaved, machine, write
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import METHODS, products, step_of

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
SHAPE = (4, 160, 8)


def profiled(method: str, dtype: str, layers: int) -> Round:
    """A step whose figures are the seconds of its kernels."""
    step = step_of(method, dtype, layers, 576, 32, SHAPE)
    flops = products(step)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])

    def once() -> dict[str, float]:
        with profile(activities=activities, acc_events=True) as recorded:
            step()
        seconds = {"products": 0.0, "attention": 0.0, "rest": 0.0}
        for event in recorded.key_averages():
            if (
                event.device_type == DeviceType.CPU
            ):  # of what CUDA ran there are events of its own, whose time these have too
                seconds[_kind(event.key)] += _seconds(event)
        return seconds | {"flops": flops}

    return once


def _kind(name: str) -> str:
    if name.removeprefix("aten::") in PRODUCTS:
        return "products"
    return "attention" if "scaled_dot_product" in name else "rest"


def _seconds(event: Any) -> float:
    return (
        float(event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total) / 1e6
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the backbone"
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = ["frozen", "gatera", "gatera_70_closed", "gatera_decided", "hira", "peft_lora", "peft_hira"]
    parser.add_argument("--only", nargs="+", choices=METHODS, default=chosen)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    contenders = {method: (profiled, (method, args.dtype, args.layers)) for method in args.only}
    measured = interleaved(contenders, args.rounds, warmup=1)
    write(args.out, vars(args), measured)

    print(machine())
    print("method             products, s   GFLOP   GFLOP/s   attention, s   rest, s   all, s")
    for name, one in measured.items():
        products, attention, rest = (
            statistics.median(one.rounds(kind)) for kind in ("products", "attention", "rest")
        )
        flops = one.rounds("flops")[0] / 1e9
        line = f"{name:<18}{products:>12.2f}{flops:>8.0f}{flops / products:>10.0f}"
        print(f"{line}{attention:>15.2f}{rest:>10.2f}{products + attention + rest:>9.2f}")


if __name__ == "__main__":
    main()
