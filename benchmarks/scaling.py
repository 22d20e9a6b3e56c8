"""How a GateRA step grows with tokens, targets, rank, width and layers: seconds and products, one size doubled at a time.

    python benchmarks/scaling.py [--dtype float32] [--rounds 3] [--out results/scaling.json]

The middle is 8 layers of SmolLM2-135M's width, 4 rows of 128 tokens with 8 targets each, rank 32. Products should double with
tokens and layers (attention's scores and the embeddings' share apart), quadruple with the width, and hardly grow with the rank;
seconds should follow. A line compares a size with half of it.
"""

import argparse
import statistics
from typing import Any

from interleaved import clock, interleaved, machine, ratio, write
from train_step import counts, step_of

MIDDLE: dict[str, Any] = {"layers": 8, "width": 576, "rank": 32, "rows": 4, "tokens": 128, "targets": 8}
SIZES = {
    "tokens": (64, 128, 256),
    "rows": (2, 4, 8),
    "targets": (8, 16, 32),
    "rank": (16, 32, 64),
    "width": (576, 1152),
    "layers": (4, 8, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="gatera", help="as in train_step.py")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the backbone"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    print(machine())
    print("size              s, median   ÷ half of it             GFLOP   ÷ half   peak MB")
    for name, sizes in SIZES.items():
        contenders = {}
        for size in sizes:
            one = MIDDLE | {name: size}
            shape = (one["rows"], one["tokens"], one["targets"])
            contenders[f"{name} {size}"] = (
                step_of,
                (args.method, args.dtype, one["layers"], one["width"], one["rank"], shape),
            )
        counted = counts({label: setting for label, (_, setting) in contenders.items()})
        measured = interleaved(contenders, args.rounds)
        write(
            args.out and args.out.replace(".json", f"_{name}.json"),
            vars(args) | MIDDLE | {"counted": counted},
            measured,
        )
        half, half_flops = None, 0.0
        for label, one in measured.items():
            flops = counted[label]["flops"]
            line = f"{label:<16}{statistics.median(clock(one)):>11.3f}"
            if half is None:
                print(f"{line}{'':<28}{flops / 1e9:>6.0f}{'':<9}{one.peak_bytes / 1e6:>10.0f}")
            else:
                seconds, products = ratio(clock(one), clock(half)), flops / half_flops
                print(
                    f"{line}   {seconds:<25}{flops / 1e9:>6.0f}{products:>9.2f}{one.peak_bytes / 1e6:>10.0f}"
                )
            half, half_flops = one, flops


if __name__ == "__main__":
    main()
