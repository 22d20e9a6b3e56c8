"""The subcommands that this package adds to Lightning's, each a function in the module of its name."""

import importlib
from collections.abc import Callable, Sequence
from typing import cast

LIGHTNING_SUBCOMMANDS = ("fit", "validate", "test", "predict")

SUMMARIES = {
    "chat": "talk to a fine-tuned model in the terminal",
    "generate": "print a fine-tuned model's answers to prompts",
    "preview": "show a recipe's examples and batch statistics without loading weights",
    "estimate": "predict memory, FLOPs and communication of a training step (alias: plan)",
    "demo": "evaluate a small model, fine-tune it with quickstart.yaml, and evaluate it again",
    "serve": "serve a fine-tuned model over HTTP, with OpenAI's endpoints",
    "harness": "evaluate a model on tasks of lm-eval, EleutherAI's evaluation harness",
    "compare": "test runs against each other",
    "gates": "visualize an adapter's gates",
    "export": "write the adapter folder of a checkpoint",
    "submit": "submit fit as a SLURM job",
}
"""Subcommand -> what it does, for `--help`."""

ALIASES = {"plan": "estimate"}
"""Another name of a subcommand -> its name."""


def load_subcommand(name: str) -> Callable[[Sequence[str]], None] | None:
    """Import one subcommand, and nothing that only the others need.

    Args:
        name: The first argument on the command line.

    Returns:
        The function that runs it, which takes the remaining arguments; None if Lightning handles the name.
    """
    name = ALIASES.get(name, name)
    if name not in SUMMARIES:
        return None
    module = importlib.import_module(f"{__name__}.{name}")
    return cast(Callable[[Sequence[str]], None], getattr(module, name))
