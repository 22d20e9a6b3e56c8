"""Prompts and answers as token ids: where an answer begins, and what is cut to fit ``max_length``."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.tokenization.control_tokens import token_ids, token_offsets


class TokenizedExample(NamedTuple):
    """Token ids of a prompt and of its candidate answers."""

    prompt_ids: list[int]

    answer_ids: list[list[int]]
    """Token ids of each candidate, EOS included."""

    truncated: bool
    """True if the prompt was cut."""


def tokenize_example(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    answers: Sequence[str],
    max_length: int,
    *,
    special_tokens: bool = True,
    answer_suffix: str = "",
) -> TokenizedExample:
    """Tokenize a prompt and its candidate answers, and truncate the prompt where necessary.

    Prompt and answer are tokenized together and divided where the prompt ends, so the boundary is tokenized
    as in running text. Escaped control tokens (:mod:`.control_tokens`) are tokenized as text. If the
    longest candidate does not fit into ``max_length``, the prompt loses tokens after its BOS, the same ones
    for every candidate.

    Args:
        tokenizer: The backbone's tokenizer.
        prompt: Text of the prompt.
        answers: Text of each candidate as it follows the prompt, with its leading space if there is one.
        max_length: Maximum number of tokens of prompt and answer together.
        special_tokens: Whether the tokenizer adds special tokens; False if a chat template has written them.
        answer_suffix: Text between answer and EOS that closes the turn in a chat template.

    Raises:
        ValueError: An answer leaves no room for a single token of the prompt.
    """
    prompt_ids = tokenize_prompt(tokenizer, prompt, special_tokens=special_tokens)
    candidates = []
    for answer in answers:
        joint = token_ids(tokenizer, prompt + answer + answer_suffix, special_tokens=special_tokens)
        if joint[-1] == tokenizer.eos_token_id:
            joint.pop()
        if joint[: len(prompt_ids)] == prompt_ids:
            answer_ids = joint[len(prompt_ids) :]
        else:  # a token spans the boundary, but the prompt must be tokenized as it will be for generation
            answer_ids = token_ids(tokenizer, answer + answer_suffix, special_tokens=False)
        candidates.append([*answer_ids, tokenizer.eos_token_id])
    longest = max(len(ids) for ids in candidates)
    room = max_length - longest
    if len(prompt_ids) <= room:
        return TokenizedExample(prompt_ids, candidates, truncated=False)
    bos = prompt_ids[:1] if prompt_ids[:1] == [tokenizer.bos_token_id] else []
    if room < len(bos) + 1:
        raise ValueError(
            f"an answer has {longest} tokens, which leaves no room for a prompt in max_length {max_length}"
        )
    return TokenizedExample(bos + prompt_ids[len(prompt_ids) - room + len(bos) :], candidates, truncated=True)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, special_tokens: bool = True
) -> list[int]:
    """Tokenize a text that is to be continued: without the EOS that some tokenizers append to every text."""
    ids = token_ids(tokenizer, prompt, special_tokens=special_tokens)
    if special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def token_ranges(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    ranges: Sequence[tuple[int, int]],
    prompt_ids: Sequence[int],
    *,
    special_tokens: bool = True,
) -> list[tuple[int, int]]:
    """Convert character ranges of a prompt to token ranges.

    A token belongs to the range that contains its first character. Ranges that were truncated are left out.

    Args:
        tokenizer: The backbone's tokenizer.
        prompt: Text of the prompt.
        ranges: Character ranges ``(start, end)``.
        prompt_ids: The prompt's tokens from :func:`tokenize_example`, possibly truncated.
        special_tokens: As for :func:`tokenize_example`.

    Raises:
        ValueError: The tokenizer does not report the characters of its tokens.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "train_on every_response needs a fast tokenizer, which reports the characters of each token"
        )
    offsets, ranges = token_offsets(tokenizer, prompt, ranges, special_tokens=special_tokens)
    removed = len(tokenize_prompt(tokenizer, prompt, special_tokens=special_tokens)) - len(prompt_ids)
    first_token = 1 if removed and prompt_ids[0] == tokenizer.bos_token_id else 0  # BOS survives truncation
    found = []
    for start, end in ranges:
        # Tokens without characters (BOS, a space that the tokenizer trims) neither start nor end a range.
        inside = [i for i, (first, last) in enumerate(offsets) if start <= first < end and first < last]
        if inside and inside[-1] - removed >= first_token:
            found.append((max(inside[0] - removed, first_token), inside[-1] - removed + 1))
    return found
