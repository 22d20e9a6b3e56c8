"""The flags that `chat` and `generate` share, and their checks."""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.position_mask import missing_mask_problem
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.backbone.config import BackboneConfig, Dtype, Quantization, stored_backbone
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.cli.draft_arguments import add_draft_arguments, check_draft
from gatera_lightning.errors import AdapterFileError, ConfigError


class ModelChoice(NamedTuple):
    """Which model the flags choose."""

    backbone: BackboneConfig
    adapter: AdapterConfig | None
    """None for the backbone alone."""

    folder: str | None
    """The adapter's folder; None for the backbone alone."""

    draft: str | None = None
    """The folder of the adapter that drafts; None for plain decoding."""


def add_arguments(parser: argparse.ArgumentParser, templates: Sequence[str]) -> None:
    """Add the shared flags to a parser.

    Args:
        parser: The parser of a subcommand.
        templates: The accepted values of `--template`.
    """
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--adapter", metavar="FOLDER", help=f"{ACCEPTED}; every checkpoint has a folder beside it"
    )
    model.add_argument(
        "--backbone",
        metavar="ID",
        help="a model without an adapter: hub id, folder, .gguf file or package:NAME",
    )
    parser.add_argument(
        "--template",
        choices=templates,
        help="prompt template; default: the data.template of the adapter's training if its folder stores it, "
        "else chat if the tokenizer has a chat template, else plain",
    )
    parser.set_defaults(templates=templates)
    parser.add_argument(
        "--max_new_tokens", metavar="N", type=int, default=256, help="longest answer in tokens; default: 256"
    )
    parser.add_argument(
        "--fast",
        metavar="G",
        type=float,
        nargs="?",
        const=0.1,
        help="treat gates below G as 0 and above 1 - G as 1: one weight read per token instead of two, and "
        "the answer may differ; default G: 0.1",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="sampling temperature; default: 0, greedy decoding",
    )
    parser.add_argument(
        "--top_p",
        metavar="P",
        type=float,
        help="sample from the smallest set of tokens with at least this probability",
    )
    parser.add_argument("--seed", metavar="N", type=int, help="random seed of sampling; default: 0")
    parser.add_argument(
        "--dtype", choices=get_args(Dtype), default="auto", help="dtype of the backbone; default: auto"
    )
    parser.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="how the backbone's weights are stored; default: as when the adapter was trained, else none",
    )
    add_draft_arguments(parser)
    parser.add_argument(
        "--gates",
        action="store_true",
        help="color each token by its gate; without colors, print one line per token: its text as JSON, a "
        "tab, its gate",
    )


def check_arguments(args: argparse.Namespace, more_problems: Sequence[str] = ()) -> ModelChoice:
    """Check the shared flags; reads the adapter's settings, but no weights.

    Args:
        args: The flags of :func:`add_arguments`.
        more_problems: Other problems of the same command line, to report with these.

    Raises:
        ConfigError: With everything that cannot work.
    """
    problems: list[str] = []
    check = _check_adapter if args.backbone is None else _check_backbone
    choice = check(args, problems)
    problems += more_problems
    problems += _decoding_problems(args)
    draft = check_draft(args, problems)
    if draft is not None and args.gates:
        problems.append("--gates: gates of drafted tokens are not shown; accepted without --draft")
    if problems:
        raise ConfigError(problems)
    return choice._replace(draft=draft)


def text_problem(text: str) -> str | None:
    """Return why a text cannot be a prompt; None if it can."""
    if not text.strip():
        return "is empty"
    try:
        text.encode()
    except UnicodeEncodeError:  # Python decodes other bytes of the command line as surrogates
        return "is not UTF-8"
    return None


def _check_backbone(args: argparse.Namespace, problems: list[str]) -> ModelChoice:
    backbone = BackboneConfig(id=args.backbone, dtype=args.dtype, quantization=args.quantization or "none")
    if not args.backbone.removeprefix("package:").strip():
        problems.append(
            f"--backbone: {args.backbone!r}; accepted: hub id, folder, .gguf file or package:NAME"
        )
    else:
        found = backbone.problems()
        problems += [f"--backbone: {problem.removeprefix('backbone.id: ')}" for problem in found]
    if args.gates:
        problems.append("--gates: a backbone without an adapter has no gates; accepted with --adapter")
    return ModelChoice(backbone, None, None)


def _check_adapter(args: argparse.Namespace, problems: list[str]) -> ModelChoice:
    try:
        folder = adapter_folder(args.adapter)
        adapter, origin = read_adapter_config(folder)
    except (AdapterFileError, ConfigError) as error:
        problems.append(str(error) if isinstance(error, ConfigError) else f"--adapter: {error}")
        return ModelChoice(BackboneConfig(id=""), None, None)
    if origin["id"] is None:
        problems.append(f"--adapter: {folder} does not store the id of its backbone")
    if args.gates and adapter.gate.kind == "none":
        problems.append(
            f"--gates: {folder} has no gates (gate: none, update: {adapter.update}); "
            "accepted: an adapter with gates"
        )
    if problem := missing_mask_problem(adapter):
        problems.append(f"--adapter: {folder}: {problem}")
    backbone = stored_backbone(origin, args.dtype, args.quantization)
    return ModelChoice(backbone, adapter, folder)


def _decoding_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens: {args.max_new_tokens}; accepted: an integer of at least 1")
    if not 0 <= args.temperature < math.inf:
        problems.append(
            f"--temperature: {args.temperature}; accepted: 0 for greedy decoding, or a number above 0"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        problems.append(f"--top_p: {args.top_p}; accepted: a probability above 0, up to 1")
    if args.fast is not None and not 0 < args.fast <= 0.5:
        problems.append(f"--fast: {args.fast}; accepted: a gate value above 0, up to 0.5")
    if args.fast is not None and args.backbone is not None:
        problems.append("--fast: a backbone without an adapter has no gates; accepted with --adapter")
    for name in ("top_p", "seed"):
        value = getattr(args, name)
        if value is not None and args.temperature == 0:
            problems.append(
                f"--{name}: {value}, but greedy decoding does not sample; accepted with --temperature above 0"
            )
    return problems
