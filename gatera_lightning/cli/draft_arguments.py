"""The flags of draft adapters, which `chat`, `generate` and `serve` share, and their checks."""

import argparse

from gatera_lightning.adapters.draft_adapter import draft_problem
from gatera_lightning.adapters.serialization import read_adapter_config, trained_template
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.generation.drafting.checks import block_problem
from gatera_lightning.generation.drafting.config import DraftConfig


def add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser."""
    parser.add_argument(
        "--draft",
        metavar="FOLDER",
        help=f"an adapter that drafts tokens, which the model verifies: the same answer in fewer forward "
        f"passes; it turns itself off if that takes longer ({ACCEPTED})",
    )
    parser.add_argument(
        "--draft_block",
        metavar="N",
        type=int,
        help=f"tokens per block with --draft; default: {DraftConfig.block}",
    )


def check_draft(args: argparse.Namespace, problems: list[str]) -> str | None:
    """Return the folder of the draft adapter, if there is one; reads its settings, but no weights.

    Args:
        args: The flags of :func:`add_draft_arguments`.
        problems: What is wrong with them is added to it.
    """
    if args.draft is None:
        if args.draft_block is not None:
            problems.append(f"--draft_block: {args.draft_block}, without drafts; accepted with --draft")
        return None
    if args.draft_block is not None and args.draft_block < 2:
        problems.append(f"--draft_block: {args.draft_block}; accepted: an integer of at least 2")
    try:
        folder = adapter_folder(args.draft, "--draft")
        config, _ = read_adapter_config(folder)
    except (AdapterFileError, ConfigError) as error:
        problems.append(str(error) if isinstance(error, ConfigError) else f"--draft: {error}")
        return None
    if problem := draft_problem(config):
        problems.append(f"--draft: {folder}: {problem}")
    elif problem := block_problem(draft_config(args).block, config):
        problems.append(f"--draft_block: {problem}")
    return folder


def template_hint(folder: str, template: str) -> str:
    """Say that a draft adapter was trained with another prompt template than it drafts for; else empty.

    Args:
        folder: The folder of the draft adapter.
        template: The template of the prompts.
    """
    trained = trained_template(folder)
    if trained in (None, template):
        return ""
    return f" (trained with template {trained}, so fewer drafts may be accepted)"


def draft_config(args: argparse.Namespace) -> DraftConfig:
    """Return how the flags say to draft."""
    return DraftConfig() if args.draft_block is None else DraftConfig(block=args.draft_block)
