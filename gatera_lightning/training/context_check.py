"""Examples that are longer than the backbone's context, found before its weights are loaded."""

from collections.abc import Iterator
from typing import Any

from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import context_length, load_config
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.errors import ConfigError
from gatera_lightning.generation.decoding import DecodingConfig

_SPLITS = {"fit": ("train", "validation"), "validate": ("validation",)}


def check_context(trainer: Any, stage: str, backbone: BackboneConfig, decoding: DecodingConfig) -> None:
    """Raise ConfigError if an example of a stage does not fit into the backbone's context.

    Args:
        trainer: The Trainer. Its data module is checked if it is one of this project.
        stage: fit, validate, test or predict.
        backbone: The backbone, whose config is read.
        decoding: How answers are generated after test prompts.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SupervisedDataModule) or not data.tables:
        return
    limit = context_length(load_config(backbone))
    if limit is None:
        return
    tables, max_new_tokens = data.tables, decoding.max_new_tokens
    problems = []
    for split in _SPLITS.get(stage, ("test",)):
        if split not in tables:
            continue
        longest, example = max(_lengths(tables[split]), default=(0, 0))
        if longest > limit:
            problems.append(
                f"data.max_length: {data.max_length}, and example {example} of {split} has {longest:,} "
                f"tokens, but the context of {backbone.id} has {limit:,}; accepted: at most {limit}"
            )
        elif split == "test" and "generation" in data.evaluate_by:
            longest, example = max(_prompt_lengths(tables[split]), default=(0, 0))
            if longest + max_new_tokens > limit:
                problems.append(
                    f"model.decoding.max_new_tokens: {max_new_tokens}, after the prompt of example {example} "
                    f"of test, which has {longest:,} tokens, but the context of {backbone.id} has {limit:,}; "
                    f"accepted: at most {limit - longest}, or a smaller data.max_length"
                )
    if problems:
        raise ConfigError(problems, on_every_rank=True)


def _lengths(table: Any) -> Iterator[tuple[int, int]]:
    """The tokens of each example with its longest candidate, and the example's index."""
    columns = table.select_columns(["lengths", "example"])
    return ((max(row["lengths"]), row["example"]) for row in columns)


def _prompt_lengths(table: Any) -> Iterator[tuple[int, int]]:
    """The tokens of each example's prompt, and the example's index."""
    columns = table.select_columns(["prompt", "example"])
    return ((len(row["prompt"]), row["example"]) for row in columns)
