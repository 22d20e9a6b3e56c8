"""The texts on which `gates` shows gates: given ones, or a recipe's examples, with or without a response."""

import argparse
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gatera_lightning.cli.commands.preview import PreviewedSplit
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_prompt
from gatera_lightning.errors import ConfigError
from gatera_lightning.gate_analysis.probing import EXAMPLE_TEXTS, ProbeText
from gatera_lightning.generation.decoding import DecodingConfig, generate


def plain_texts(given: list[str] | None, tokenizer: PreTrainedTokenizerBase) -> tuple[list[ProbeText], str]:
    """Tokenize the given texts, or the example texts for None; also describe them.

    Raises:
        ConfigError: If a text has no tokens.
    """
    texts = []
    for text in given or EXAMPLE_TEXTS:
        ids = tokenize_prompt(tokenizer, text)
        if not ids:
            raise ConfigError(f"--text: {text!r:.60} has no tokens; accepted: a text with at least one token")
        texts.append(ProbeText(text if len(text) <= 60 else text[:59] + "…", ids, len(ids)))
    return texts, f"{len(texts)} {'given' if given else 'example'} texts"


def recipe_texts(
    args: argparse.Namespace, fit_flags: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[ProbeText], str]:
    """Read a recipe's examples, without their responses if these are generated; also describe them.

    Args:
        args: The flags of `gates`: ``split``, ``rows`` and ``generate``.
        fit_flags: The recipe, as flags of `fit`.
        tokenizer: That of the adapter's backbone.

    Raises:
        ConfigError: If the recipe's vocabulary is another.
    """
    split_name, count = args.split or "test", args.rows or 4
    split = PreviewedSplit(["fit", *fit_flags], split_name)
    recipe_tokenizer = split.datamodule.tokenizer
    assert recipe_tokenizer is not None  # PreviewedSplit connects it
    if recipe_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"model.backbone.id: the vocabulary of {split.model.backbone.id!r} is not that of the adapter's "
            f"backbone {tokenizer.name_or_path!r}; "
            "accepted: a recipe for the adapter's backbone, or --model.backbone.id"
        )
    texts = []
    for index in range(min(count, len(split.table.examples))):
        batch = split.table.batch([index], split.train_on, all_candidates=False)
        length = int(batch["attention_mask"][0].sum())
        ids = batch["input_ids"][0, :length].tolist()
        prompt_length = int((~batch["response_mask"][0, :length]).long().cumprod(0).sum())
        example = split.table.examples[index]
        title = f"{example['task']}, example {example['example']}"
        texts.append(ProbeText(title, ids[:prompt_length] if args.generate else ids, prompt_length))
    return texts, f"the first {len(texts)} examples of the {split_name} split of {' '.join(fit_flags)}"


def check_lengths(texts: list[ProbeText], generated: int, limit: int | None) -> None:
    """Raise ConfigError unless every text and its response fit into a context of ``limit`` tokens."""
    if limit is None:
        return
    if generated >= limit:
        raise ConfigError(f"--generate: {generated:,}; accepted by this model: less than {limit:,}")
    accepted = "accepted by this model" + (f" with --generate {generated:,}" if generated else "")
    if problems := [
        f"--text: {text.title!r} has {len(text.token_ids):,} tokens; "
        f"{accepted}: at most {limit - generated:,}"
        for text in texts
        if len(text.token_ids) + generated > limit
    ]:
        raise ConfigError(problems)


def with_response(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: ProbeText, tokens: int
) -> ProbeText:
    """Return the text followed by the model's response of at most ``tokens`` tokens."""
    prompt = collate_prompts(
        [text.token_ids], [0], pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
    )
    prompt["input_ids"] = prompt["input_ids"].to(model.device)
    prompt["attention_mask"] = prompt["attention_mask"].to(model.device)
    model.eval()
    ids = generate(model, prompt, DecodingConfig(max_new_tokens=tokens))[0].tolist()
    return ProbeText(text.title, text.token_ids + ids, len(text.token_ids), generated=True)
