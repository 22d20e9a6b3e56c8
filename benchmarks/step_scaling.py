"""How a step grows with tokens, supervised tokens, rank, width and layers: time and matmuls.

    python -m benchmarks.step_scaling [--dtype float32] [--rounds 3] [--out results/step_scaling.json]

One size is doubled at a time, starting from 8 layers of SmolLM2-135M's width, 4 examples of 128 tokens with 8
supervised tokens each, and rank 32. FLOPs should double with tokens and layers (except for attention's scores
and the share of the embeddings), quadruple with the width, and hardly grow with the rank; seconds should
follow. A line compares a size with half of it.
"""

import statistics
from dataclasses import asdict, replace

from benchmarks.harness.arguments import add_dtype, build_parser
from benchmarks.harness.interleaving import format_ratio, run_interleaved, write_results
from benchmarks.harness.machine import describe_machine
from benchmarks.harness.steps import METHODS, StepSettings, count_each, timed_step

SIZES = {
    "tokens": (64, 128, 256),
    "examples": (2, 4, 8),
    "supervised": (8, 16, 32),
    "rank": (16, 32, 64),
    "width": (576, 1152),
    "layers": (4, 8, 16),
}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--method", choices=METHODS, default="gatera", help="as in train_step.py")
    add_dtype(parser)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=SIZES, help="sizes to double")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a JSON file; the name of the size is added to its name")
    args = parser.parse_args()
    start = StepSettings(args.dtype, layers=8, tokens=128)
    print(describe_machine())
    print("size              s, median   ÷ half the size          GFLOP   ÷ half   process MB")
    for name in args.only:
        settings = {f"{name} {size}": (args.method, replace(start, **{name: size})) for size in SIZES[name]}
        counted = count_each(settings)
        contenders = {label: (timed_step, setting) for label, setting in settings.items()}
        measured = run_interleaved(contenders, args.rounds)
        write_results(
            args.out and args.out.replace(".json", f"_{name}.json"),
            vars(args) | {"only": name} | asdict(start) | {"counted": counted},
            measured,
        )
        half, half_flops = None, 0.0
        for label, one in measured.items():
            flops = counted[label]["flops"]
            seconds = "" if half is None else format_ratio(one.seconds, half.seconds)
            growth = "" if half is None else f"{flops / half_flops:.2f}"
            print(
                f"{label:<16}{statistics.median(one.seconds):>11.3f}   {seconds:<25}"
                f"{flops / 1e9:>5.0f}{growth:>9}{one.peak_bytes / 1e6:>13.0f}"
            )
            half, half_flops = one, flops


if __name__ == "__main__":
    main()
