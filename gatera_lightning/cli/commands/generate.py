"""`generate`: a model's answers to prompts, for a terminal or a pipe."""

import sys
from collections.abc import Sequence

from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.cli.terminal_arguments import add_arguments, text_problem
from gatera_lightning.cli.terminal_io import accept_any_bytes
from gatera_lightning.cli.terminal_model import TerminalModel
from gatera_lightning.datamodules.prompts.conversations import Instruction
from gatera_lightning.errors import ConfigError


def generate(argv: Sequence[str]) -> None:
    """Print the model's answer to each `--prompt`, and nothing else to standard output.

    Args:
        argv: The flags.

    Raises:
        ConfigError: Something cannot work; no weight is loaded yet.
        SystemExit: With 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    accept_any_bytes()
    prompts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in args.prompt]
    problems = [
        f"--prompt: {prompt!r:.60} {problem}; accepted: a text"
        for prompt in prompts
        if (problem := text_problem(prompt))
    ]
    model = TerminalModel(args, problems)
    prompt_ids = [
        model.prompt_ids(prompt if model.template == "none" else Instruction(prompt, "", ""))
        for prompt in prompts
    ]
    if too_long := [
        f"--prompt: {prompt!r:.60} has {len(ids):,} tokens; accepted by this model with --max_new_tokens "
        f"{args.max_new_tokens}: at most {model.prompt_limit:,}"
        for prompt, ids in zip(prompts, prompt_ids, strict=True)
        if len(ids) > model.prompt_limit
    ]:
        raise ConfigError(too_long)
    model.describe()
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        if len(prompts) > 1:
            model.note(f"> {prompt}")
        if model.answer(ids).stopped:
            raise SystemExit(130)


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "generate",
        description="Print a fine-tuned model's answers to prompts; nothing else goes to standard output.",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        required=True,
        help="a prompt, or - to read it from standard input; may be repeated",
    )
    add_arguments(parser, ("chat", "plain", "alpaca", "none"))
    return parser
