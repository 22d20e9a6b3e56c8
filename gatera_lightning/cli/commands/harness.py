"""`harness`: a model on tasks of lm-eval, EleutherAI's evaluation harness."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gatera_lightning.backbone.config import BackboneConfig, Dtype
from gatera_lightning.checkpointing.output_check import folder_problem
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.datamodules.prompts.templates import Template
from gatera_lightning.datamodules.tasks.commonsense import AnswerFormat
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.evaluation.harness.results_table import print_harness_results
from gatera_lightning.evaluation.harness.rows import LocalModel
from gatera_lightning.evaluation.harness.task_loading import load_tasks, missing_extra
from gatera_lightning.evaluation.results_table import print_results
from gatera_lightning.terminal.printing import print_text


def harness(argv: Sequence[str]) -> None:
    """Evaluate a model on tasks, print the results, and write predictions for `compare` to `--out`.

    Args:
        argv: The flags.

    Raises:
        ConfigError: Something cannot work; no weight is loaded yet, unless `--out` holds another evaluation.
    """
    args = _parser().parse_args(argv)
    source = _check_arguments(args)
    template = source.template(args.template)
    if args.apply_chat_template and template == "plain":
        raise ConfigError(
            "--apply_chat_template: the template is plain, and lm-eval's own prompts are plain already; "
            "accepted with --template chat or alpaca, or leave it out"
        )
    local: dict[str, Any] = {
        "adapter": source.adapter_folder,
        "backbone": None if source.adapter_folder else source.backbone.id,
        "template": template,
        "data_dir": args.data_dir,
        "answer_format": args.answer_format,
        "max_length": args.max_length,
    }
    tasks = load_tasks(args.tasks, local, args.include_path)
    # Lightning and lm-eval are not needed for the messages above, and take seconds to import.
    from gatera_lightning.evaluation.harness import run
    from gatera_lightning.evaluation.harness.model import GateRALM

    if problems := run.few_shot_problems(tasks, args.num_fewshot):
        raise ConfigError(problems)
    settings = run.HarnessSettings(args.num_fewshot, args.limit, args.apply_chat_template, local)
    model = GateRALM(
        source.adapter_folder,
        None if source.adapter_folder else source.backbone.id,
        dtype=args.dtype,
        template=template,
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    identity = run.harness_identity(model, tasks, settings)
    run.check_folder(args.out, identity)
    found = run.evaluate(model, tasks, settings)
    places, predictions = run.write_results(args.out, found, model, tasks, identity)
    print_harness_results(found)
    for result in places.values():
        if result.text_metrics():
            print_results(result)
    for name, reason in predictions.left_out.items():
        print_text(f"{name}: not in the predictions for compare, because {reason}")
    for place in places:
        print_text(f"predictions for compare: {place}")
    print_text(f"results of lm-eval: {args.out / run.RESULTS_FILE}")


def _check_arguments(args: argparse.Namespace) -> LocalModel:
    """Return the model; raise ConfigError with everything that cannot work."""
    problems = [problem] if (problem := missing_extra()) else []
    source = None
    if args.backbone is not None and not args.backbone.removeprefix("package:").strip():
        problems.append(
            f"--backbone: {args.backbone!r}; accepted: hub id, folder, .gguf file or package:NAME"
        )
    elif args.backbone is not None:
        found = BackboneConfig(id=args.backbone).problems()
        problems += [f"--backbone: {problem.removeprefix('backbone.id: ')}" for problem in found]
    try:
        folder = None if args.adapter is None else adapter_folder(args.adapter)
        source = LocalModel.of(folder, args.backbone, args.dtype)
    except AdapterFileError as error:
        problems.append(f"--adapter: {error}")
    except ConfigError as error:
        problems += error.problems
    if not any(args.tasks):
        problems.append("--tasks: names no task; accepted: names of tasks, separated by commas")
    if args.limit is not None and not _is_limit(args.limit):
        problems.append(
            f"--limit: {args.limit:g}; accepted: a number of rows of at least 1, or a share of them below 1"
        )
    if args.num_fewshot is not None and args.num_fewshot < 0:
        problems.append(f"--num_fewshot: {args.num_fewshot}; accepted: a number of examples, or 0")
    if args.batch_size != "auto" and not (args.batch_size.isdecimal() and int(args.batch_size) > 0):
        problems.append(f"--batch_size: {args.batch_size!r}; accepted: an integer of at least 1, or auto")
    elif args.batch_size != "auto":
        args.batch_size = int(args.batch_size)
    if args.max_length is not None and args.max_length < 2:
        problems.append(f"--max_length: {args.max_length}; accepted: a number of tokens of at least 2")
    for name in ("data_dir", "include_path"):
        folder = getattr(args, name)
        if folder is not None and not Path(folder).is_dir():
            problems.append(f"--{name}: {folder!r} is no folder; accepted: an existing folder")
    if problem := folder_problem(args.out):
        problems.append(f"--out: {args.out} cannot be written ({problem}); accepted: a writable folder")
    if problems:
        raise ConfigError(problems)
    assert source is not None
    return source


def _is_limit(limit: float) -> bool:
    return 0 < limit < 1 or (math.isfinite(limit) and limit >= 1 and limit == int(limit))


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "harness",
        description="Evaluate a fine-tuned model on tasks of lm-eval, EleutherAI's evaluation harness, and "
        "write predictions that compare reads. lm-eval's own tasks (bbh, mmlu, arc_easy, hellaswag, "
        "winogrande, …) read the hub; gatera_arc_easy and its like read --data_dir.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--adapter",
        metavar="FOLDER",
        help=ACCEPTED,
    )
    model.add_argument(
        "--backbone",
        metavar="ID",
        help="a model without an adapter: hub id, folder, .gguf file or package:NAME",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        required=True,
        help="tasks, groups, tags or patterns, separated by commas",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="folder of the results, for compare"
    )
    parser.add_argument(
        "--limit",
        metavar="N",
        type=float,
        help="only the first N rows of each task, or a share of them below 1",
    )
    parser.add_argument(
        "--num_fewshot",
        metavar="N",
        type=int,
        help="examples before each question; default: those of each task",
    )
    parser.add_argument(
        "--batch_size", metavar="N", default="8", help="sequences per forward pass, or auto; default: 8"
    )
    parser.add_argument(
        "--template",
        choices=get_args(Template),
        help="prompt template of local tasks, and of --apply_chat_template; default: the data.template of "
        "the adapter's training if its folder stores it, else chat if the tokenizer has a chat template, "
        "else plain",
    )
    parser.add_argument(
        "--apply_chat_template",
        action="store_true",
        help="format the prompts of lm-eval's own tasks with the template; default: lm-eval's prompts",
    )
    parser.add_argument(
        "--data_dir",
        metavar="FOLDER",
        help="folder of local tasks: TASK/test.json in LLM-Adapters' schema; ParlAI's files for dialogues",
    )
    parser.add_argument(
        "--answer_format",
        choices=get_args(AnswerFormat),
        default="label",
        help="answers of local tasks, as data.answer_format in training; default: label",
    )
    parser.add_argument(
        "--max_length",
        metavar="N",
        type=int,
        help="maximum number of tokens of a row; default: the model's context",
    )
    parser.add_argument(
        "--include_path", metavar="FOLDER", help="a folder with further task YAMLs, which may run code"
    )
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="auto", help="dtype of the backbone; default: auto"
    )
    return parser
