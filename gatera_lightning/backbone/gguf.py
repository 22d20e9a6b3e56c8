"""Reading a GGUF file once: Transformers parses it for the tokenizer, twice for the model, and maps names for every module.

Its header holds the vocabulary, which the gguf package reads in pure Python: four seconds each time for 49,000 tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any
from unittest.mock import patch


@contextmanager
def read_once(*, keep: bool) -> Iterator[None]:
    """Inside, a file that was parsed before is not parsed again; ``keep`` says that more will be asked of it."""
    import gguf

    original = gguf.GGUFReader

    def reader(path: Any, *args: Any, **kwargs: Any) -> Any:
        return _parsed(original, path, os.stat(path).st_mtime_ns, *args, **kwargs)

    try:
        with (
            patch("gguf.GGUFReader", reader),
            patch("gguf.get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        ):
            yield
    finally:
        if not keep:
            _parsed.cache_clear()  # a hundred megabytes


@lru_cache(maxsize=1)
def _parsed(reader: Any, path: Any, changed: int, *args: Any, **kwargs: Any) -> Any:
    return reader(path, *args, **kwargs)
