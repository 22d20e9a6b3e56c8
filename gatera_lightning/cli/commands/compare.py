"""`compare`: the evaluations of several runs, with paired tests on the questions they share."""

from collections.abc import Sequence
from pathlib import Path

from gatera_lightning.checkpointing.atomic_files import write_text
from gatera_lightning.checkpointing.output_check import file_problem
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.errors import ConfigError
from gatera_lightning.evaluation.comparison import compare_runs
from gatera_lightning.evaluation.comparison_report import as_json, as_markdown
from gatera_lightning.evaluation.recorded_run import RecordedRun, read_run
from gatera_lightning.terminal.printing import print_text

_WRITERS = {".md": as_markdown, ".json": as_json}


def compare(argv: Sequence[str]) -> None:
    """Compare the first run with the others, print the report as Markdown, and write it to every `--out`.

    Args:
        argv: The flags.

    Raises:
        ConfigError: The runs cannot be compared; nothing is written.
    """
    args = _parser().parse_args(argv)
    problems = []
    if len(args.runs) < 2:
        problems.append(f"RUN: got {args.runs[0]} alone; expected a baseline and at least one other run")
    for out in args.out:
        if out.suffix not in _WRITERS:
            problems.append(f"--out {out}: expected a name that ends in .md or .json")
        elif problem := file_problem(out):
            problems.append(f"--out {out}: {problem}")
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
        write_text(out, _WRITERS[out.suffix](comparison))
    print_text(as_markdown(comparison), end="")


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "compare",
        description="Compare evaluations that test has written: accuracies with 95 % intervals, and paired "
        "tests against the first run on the questions that both answered.",
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="an evaluation folder (--evaluation.folder) or its predictions.jsonl; the baseline comes first",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="also write the report to a .md or .json file; may be repeated",
    )
    return parser
