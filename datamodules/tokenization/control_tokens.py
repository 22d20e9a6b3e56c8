"""Control tokens, and how the texts of users are kept from containing any.

A tokenizer reads ``<|im_end|>`` as one token that ends a turn, whoever wrote it. Texts of data and of users
are therefore escaped before a template surrounds them with control tokens: Unicode noncharacters go between
the characters of every control token that such a text spells out. Escaped control tokens are tokenized as the
characters they are made of. A text without any is tokenized as if there were no escapes.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gatera_lightning.datamodules.tokenization.chat_rendering import render_template

ESCAPE = "\ufdd0"
"""A Unicode noncharacter, which no text that is interchanged contains."""

THOUGHT_START, THOUGHT_END = "<think>", "</think>"
"""Responses write these themselves, around their reasoning."""

_FIRST_ALIAS = 0xF0000  # private use: no text that people write contains one
_MARKER = re.compile(r"\W.*\W", re.DOTALL)  # what templates write around turns; not an added word


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer."""

    tokenizer_json: str
    """The backend of a fast tokenizer as JSON; empty for other tokenizers."""

    tokens: tuple[str, ...]
    """The longest first."""

    words: frozenset[str] = frozenset()
    """Those of ``tokens`` that are neither special nor written by the chat template, such as ``<tool_call>``.
    A response may contain them, because the model writes them itself."""

    normalize: Callable[[str], str] | None = None
    """The tokenizer's normalizer, if it looks for control tokens in normalized text."""

    def escape(self, text: str, *, response: bool = False) -> str:
        """Escape the control tokens in a text.

        Args:
            text: The text of a message, an instruction or an answer.
            response: Whether the model writes it; ``words`` and the markers of its thoughts are then left
                alone.

        Raises:
            ValueError: The text contains the noncharacter that escapes.
        """
        if ESCAPE in text:
            raise ValueError(f"the text {text!r:.60} contains the noncharacter U+FDD0; expected text")
        if self.normalize is not None and self._count(self.normalize(text)) > self._count(text):
            text += ESCAPE  # normalizing makes a control token of other characters: ＜eos＞
        left_alone = {THOUGHT_START, THOUGHT_END, *self.words} if response else ()
        return self._pattern.sub(
            lambda found: found[0] if found[0] in left_alone else ESCAPE.join(found[0]), text
        )

    def alias(self, text: str) -> tuple[str, list[int]]:
        """Replace the control tokens of a text by one character each, and remove its escapes.

        Returns:
            The text for :attr:`backend`, and its length after each character of ``text``, from the start.
        """
        if any(alias in text for alias in self._aliases.values()):
            raise ValueError("the text contains private-use characters from U+F0000 on, and a control token")
        pieces, lengths, end, total = list[str](), [0], 0, 0
        for found in self._alias_pattern.finditer(text):
            pieces.append(text[end : found.start()])
            lengths += range(total + 1, total + 1 + len(pieces[-1]))
            total += len(pieces[-1])
            pieces.append("" if found[0] == ESCAPE else self._aliases[found[0]])
            lengths += [total] * (len(found[0]) - 1)
            total += len(pieces[-1])
            lengths.append(total)
            end = found.end()
        pieces.append(text[end:])
        lengths += range(total + 1, total + 1 + len(pieces[-1]))
        return "".join(pieces), lengths

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer under which control tokens have their aliases as names; ids are the same.

        Raises:
            ValueError: The tokenizer does not allow it.
        """
        if not self.tokenizer_json:
            raise ValueError(
                "the text spells out a control token, which only a fast tokenizer can read as text; "
                "remove the control token from the text"
            )
        state = json.loads(self.tokenizer_json)
        for added in state["added_tokens"]:
            added["content"] = self._aliases.get(added["content"], added["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._aliases.get(name, name): i for name, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self._aliases.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._aliases.get(model["unk_token"], model["unk_token"])
        state["truncation"] = state["padding"] = None
        try:
            return Tokenizer.from_str(json.dumps(state))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(
                f"the text spells out a control token, which this tokenizer cannot read as text ({error}); "
                "remove the control token from the text"
            ) from error

    def _count(self, text: str) -> int:
        return sum(1 for _ in self._pattern.finditer(text))

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {token: chr(_FIRST_ALIAS + number) for number, token in enumerate(self.tokens)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return _any_of(self.tokens)

    @cached_property
    def _alias_pattern(self) -> re.Pattern[str]:
        return _any_of([ESCAPE, *self.tokens])


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ControlTokens]] = WeakKeyDictionary()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return a tokenizer's control tokens: special tokens, and added tokens that look like markers.

    They are found once for each tokenizer, chat template and special tokens: looking at all tokens for every
    text would take longer than tokenizing it.
    """
    state = (str(tokenizer.special_tokens_map), tokenizer.chat_template)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != state:
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        special = {str(token) for token in tokenizer.all_special_tokens}
        markers = _template_markers(tokenizer)
        found = special | {token for token, is_special in added.items() if is_special}
        found |= {token for token in added if token in markers and _MARKER.fullmatch(token)}
        words = {token for token in added if _MARKER.fullmatch(token)} - found
        found |= words
        names = sorted((token for token in found if len(token.strip()) > 1), key=len, reverse=True)
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        json_text = "" if backend is None else backend.to_str()
        normalized = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.normalized} & found
        normalizer = backend.normalizer if backend is not None and normalized else None
        normalize = None if normalizer is None else normalizer.normalize_str
        known = _KNOWN[tokenizer] = (
            state,
            ControlTokens(json_text, tuple(names), frozenset(words), normalize),
        )
    return known[1]


def unescape(text: str) -> str:
    """Return a text without the escapes of its control tokens."""
    return text.replace(ESCAPE, "")


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool) -> list[int]:
    """Return the token ids of a text, with escaped control tokens as the characters they are made of.

    Args:
        tokenizer: The tokenizer.
        text: The text; control tokens that are not escaped become their ids.
        special_tokens: Whether the tokenizer adds special tokens.

    Raises:
        ValueError: The text has escapes, and the tokenizer cannot read control tokens as text.
    """
    if ESCAPE not in text or tokenizer.split_special_tokens:
        return list(tokenizer(unescape(text), add_special_tokens=special_tokens).input_ids)
    tokens = control_tokens(tokenizer)
    return list(tokens.backend.encode(tokens.alias(text)[0], add_special_tokens=special_tokens).ids)


def token_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str, ranges: Iterable[tuple[int, int]], *, special_tokens: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return where the tokens of a text are, and where ranges of the text are, in the same coordinates.

    Args:
        tokenizer: A fast tokenizer.
        text: As for :func:`token_ids`.
        ranges: Character ranges ``(start, end)`` of ``text``.
        special_tokens: As for :func:`token_ids`.

    Returns:
        The character range of each token, and ``ranges``.
    """
    if ESCAPE not in text:
        encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True)
        return list(encoded.offset_mapping), list(ranges)
    if tokenizer.split_special_tokens:
        encoded = tokenizer(unescape(text), add_special_tokens=special_tokens, return_offsets_mapping=True)
        lengths = [0]
        for character in text:
            lengths.append(lengths[-1] + (character != ESCAPE))
        return list(encoded.offset_mapping), [(lengths[start], lengths[end]) for start, end in ranges]
    tokens = control_tokens(tokenizer)
    aliased, lengths = tokens.alias(text)
    offsets = tokens.backend.encode(aliased, add_special_tokens=special_tokens).offsets
    return list(offsets), [(lengths[start], lengths[end]) for start, end in ranges]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")  # (?!) never matches


def _template_markers(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes around short messages; empty without a template that renders them."""
    if not tokenizer.chat_template:
        return ""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        answered = render_template(tokenizer, messages)
        return answered + render_template(tokenizer, messages[:1], generation_prompt=True)
    except ValueError:  # rendering the messages themselves reports it
        return ""
