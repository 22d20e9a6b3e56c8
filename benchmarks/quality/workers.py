"""Worker processes that do the missing runs and append them to the ledger."""

import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from benchmarks.quality import ledger
from benchmarks.quality.ledger import Line
from benchmarks.quality.plan import Run, Selection, missing_runs


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
