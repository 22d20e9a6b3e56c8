"""The private names of jsonargparse that this package depends on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jsonargparse._util


@contextmanager
def importing_only(is_allowed: Callable[[str], bool]) -> Iterator[list[str]]:
    """Let jsonargparse import only some of the classes that parsed values name.

    The public ``set_parsing_settings(import_path_denylist=…)`` holds for the whole process, for good.

    Args:
        is_allowed: Called with an import path before it is imported, and with where its object is defined.

    Yields:
        The import paths that were refused so far.
    """
    check, refused = jsonargparse._util.check_import_path, []

    def check_allowed(path: str) -> None:
        check(path)
        if not is_allowed(path):
            refused.append(path)
            raise ImportError(f"{path} is not imported")

    jsonargparse._util.check_import_path = check_allowed
    try:
        yield refused
    finally:
        jsonargparse._util.check_import_path = check
