"""Run what the ledger lacks, or draw the pages of docs/results from it.

    GATERA_DATA=… python -m benchmarks.quality --plan          # runs to do, and their CPU hours
    GATERA_DATA=… python -m benchmarks.quality --workers 2     # run them; can be killed and started again
    python -m benchmarks.quality --tables                      # draw tables and pictures; reads no model

Methods × learning rates × seeds × families, SmolLM2-135M in float32. Every finished run is one line of the
ledger, and is never repeated. Workers are processes with one thread each.
"""

import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from benchmarks.harness.arguments import build_parser, require_data
from benchmarks.quality import ledger
from benchmarks.quality.families import FAMILIES
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.plan import SEEDS, Run, Selection, cpu_seconds, forecast, missing_runs


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--plan", action="store_true", help="print the runs to do, and do none")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--stage", nargs="+", choices=("rates", "seeds"), default=["rates", "seeds"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds of the stage seeds")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ledger", type=Path, default=ledger.LEDGER)
    args = parser.parse_args()
    if 0 in args.seeds:
        parser.error("--seeds 0: it chooses the learning rate; accepted: other seeds")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: accepted: at least 1")
    selection = Selection(args.family, args.only, args.stage, args.seeds)
    if args.plan:
        print_plan(ledger.read(args.ledger), selection)
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


def run_missing(path: Path, selection: Selection, workers: int) -> None:
    """Do all missing runs, each in a worker process, and append their lines."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they import torch
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Line], Run] = {}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        while True:
            ready = [run for run in missing_runs(ledger.read(path), selection) if run not in running.values()]
            for run in ready[: workers - len(running)]:
                running[pool.submit(_execute, run)] = run
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                run = running.pop(future)
                line = future.result()
                ledger.append(path, line)
                print(
                    time.strftime("%H:%M:%S"),
                    run.family,
                    run.stage,
                    run.method,
                    run.lr,
                    run.seed,
                    f"validation {line.get('validation')}",
                    f"{line['cost']['cpu_seconds']:.0f} CPU s",
                    flush=True,
                )


def _execute(run: Run) -> Line:
    from benchmarks.quality.run import execute  # in the worker, which alone loads the model

    return execute(run)


if __name__ == "__main__":
    main()
