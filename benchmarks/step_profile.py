"""Where a training step spends its time: matmuls, attention, and everything else.

    python -m benchmarks.step_profile [--dtype float32] [--rounds 3] [--only frozen gatera peft_lora]

The steps of train_step.py, each under PyTorch's profiler: seconds in kernels, medians over the rounds.
GFLOP/s is the rate of the matmuls; where it is near the processor's peak, only fewer matmuls would take
less time.
"""

import statistics
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.arguments import add_dtype, build_parser
from benchmarks.harness.interleaving import Round, run_interleaved, write_results
from benchmarks.harness.machine import describe_machine
from benchmarks.harness.steps import METHODS, StepSettings, build_contender, count_flops

MATMULS = ("mm", "addmm", "bmm", "baddbmm")
DEFAULT = ["frozen", "gatera", "gatera_70_closed", "gatera_saturated", "hira", "peft_lora", "peft_hira"]


def profiled_step(method: str, settings: StepSettings) -> Round:
    """Return a step whose figures are the seconds in its kernels."""
    step = build_contender(method, settings).step
    step()  # the first step also probes what the model supports
    flops = float(count_flops(step))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])

    def run_once() -> dict[str, float]:
        recorded = profile(activities=activities, acc_events=True)
        step(recorded)
        seconds = {"matmuls": 0.0, "attention": 0.0, "rest": 0.0}
        for event in recorded.key_averages():
            # CUDA's kernels have events of their own, whose time the CPU's events include.
            if event.device_type == DeviceType.CPU:
                seconds[_kind(event.key)] += _seconds(event)
        return seconds | {"flops": flops}

    return run_once


def _kind(name: str) -> str:
    if name.removeprefix("aten::") in MATMULS:
        return "matmuls"
    return "attention" if "scaled_dot_product" in name else "rest"


def _seconds(event: Any) -> float:
    microseconds = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
    return float(microseconds) / 1e6


def main() -> None:
    parser = build_parser(__doc__)
    add_dtype(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=DEFAULT)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    settings = StepSettings(args.dtype, args.layers)
    contenders = {method: (profiled_step, (method, settings)) for method in args.only}
    measured = run_interleaved(contenders, args.rounds, warmup=1)
    write_results(args.out, vars(args), measured)

    print(describe_machine())
    print("method              matmuls, s   GFLOP   GFLOP/s   attention, s   rest, s   all, s")
    for name, one in measured.items():
        matmuls, attention, rest = (
            statistics.median(one.by_round(kind)) for kind in ("matmuls", "attention", "rest")
        )
        flops = one.by_round("flops")[0] / 1e9
        print(
            f"{name:<18}{matmuls:>12.2f}{flops:>8.0f}{flops / matmuls:>10.0f}"
            f"{attention:>15.2f}{rest:>10.2f}{matmuls + attention + rest:>9.2f}"
        )


if __name__ == "__main__":
    main()
