"""``compare``: evaluations of two or more runs side by side, with paired tests on the questions they have in common."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.comparison import compare_runs
from gatera_lightning.evaluation.comparison_report import as_json, as_markdown
from gatera_lightning.evaluation.recorded_run import RecordedRun, read_run

_WRITERS = {".md": as_markdown, ".json": as_json}


def compare(argv: Sequence[str]) -> None:
    """Compare the first RUN with the others, print Markdown and write ``--out`` files; ConfigError for runs that cannot be."""
    args = _parser().parse_args(argv)
    problems = (
        []
        if len(args.runs) > 1
        else [f"RUN: got {args.runs[0]} alone; expected a baseline and at least one other run"]
    )
    for out in args.out:
        if out.suffix not in _WRITERS:
            problems.append(f"--out {out}: expected a name that ends in .md or .json")
        elif not out.parent.is_dir():
            problems.append(f"--out {out}: there is no folder {out.parent}")
    runs: list[RecordedRun] = []
    for path in args.runs:
        try:
            runs.append(read_run(path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    comparison = compare_runs(runs)
    for out in args.out:
        out.write_text(_WRITERS[out.suffix](comparison), encoding="utf-8")
    print(as_markdown(comparison), end="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gatera_lightning compare",
        description="Compare the evaluations of runs, written by `test`: accuracies with 95 % intervals, and paired tests "
        "against the first run on the questions that both answered.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="a run's folder or predictions.jsonl; baseline first",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="also write .md or .json; may be given twice",
    )
    return parser
