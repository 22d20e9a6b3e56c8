"""Run what the ledger lacks, or draw the pages of docs/results from it.

    GATERA_DATA=… python -m benchmarks.quality --plan          # runs to do, and their CPU hours
    GATERA_DATA=… python -m benchmarks.quality --workers 2     # run them; can be killed and started again
    python -m benchmarks.quality --tables                      # draw docs/results/comparison.md

Methods × learning rates × seeds × families, SmolLM2-135M in float32 unless a method says otherwise. Every
finished run is one line of the ledger, and is never repeated. Workers are processes with one thread each.
"""

from pathlib import Path

from benchmarks.harness.arguments import build_parser, require_data
from benchmarks.quality import ledger, page
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS, MORE_SEEDS
from benchmarks.quality.plan import Selection, cpu_seconds, forecast
from benchmarks.quality.workers import run_missing


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="print the runs to do, and do none")
    parser.add_argument(
        "--tables", action="store_true", help="draw docs/results/comparison.md, and do no run"
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--stage", nargs="+", choices=("rates", "seeds"), default=["rates", "seeds"])
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        choices=MORE_SEEDS,
        default=list(MORE_SEEDS),
        help="seeds of the stage seeds; each method has its own",
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=ledger.LEDGER)
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: accepted: at least 1")
    selection = Selection(args.family, args.only, args.stage, args.seeds)
    if args.plan:
        print_plan(ledger.read(args.ledger), selection)
        return
    if args.tables:
        for path in page.write(ledger.read(args.ledger)):
            print(f"wrote {path.relative_to(page.DOCS.parent)}")
        return
    require_data()
    run_missing(args.ledger, selection, args.workers)


def print_plan(lines: list[Line], selection: Selection) -> None:
    """Print the runs that are missing with their predicted cost."""
    total = 0.0
    print("family       stage      method               lr        seed  CPU s")
    for run in forecast(lines, selection):
        seconds = cpu_seconds(lines, run)
        total += seconds
        rate = "" if run.stage == "untrained" else "chosen" if run.lr is None else f"{run.lr:g}"
        print(f"{run.family:<12} {run.stage:<10} {run.method:<20} {rate:<9} {run.seed:<5} {seconds:.0f}")
    print(
        f"{total / 3600:.1f} CPU hours; a search for a learning rate can take more runs than its first grid"
    )


if __name__ == "__main__":
    main()
