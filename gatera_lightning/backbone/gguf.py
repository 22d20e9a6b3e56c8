"""GGUF files: parse each file once, and repair what the format loses of a tokenizer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedTokenizerBase


@contextmanager
def parse_once(*, keep: bool) -> Iterator[None]:
    """Let Transformers parse a GGUF file only once, although it asks for it several times.

    Transformers parses a file once for the tokenizer and twice for the model, and rebuilds the map of tensor
    names for every module. The gguf package reads the vocabulary in pure Python, which takes four seconds for
    49,000 tokens.

    Args:
        keep: Whether to keep the parsed file, about a hundred megabytes, for the next block.
    """
    import gguf

    original = gguf.GGUFReader

    def reader(path: Any, *args: Any, **kwargs: Any) -> Any:
        return _parse(original, path, os.stat(path).st_mtime_ns, *args, **kwargs)

    try:
        with (
            patch("gguf.GGUFReader", reader),
            patch("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        ):
            yield
    finally:
        if not keep:
            _parse.cache_clear()


@lru_cache(maxsize=1)
def _parse(reader: Any, path: Any, modified: int, *args: Any, **kwargs: Any) -> Any:
    return reader(path, *args, **kwargs)


def restore_digit_split(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore the split into single digits that the GGUF conversion of SmolLM tokenizers loses, in place.

    GGUF stores only the name of the pre-tokenizer, and Transformers rebuilds plain byte-level BPE from it.
    Numbers would become tokens that the model has never seen in training.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
