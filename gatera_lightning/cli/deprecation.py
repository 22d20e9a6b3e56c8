"""One-line notices about deprecated flags, settings and config names."""

import logging
from functools import cache

from gatera_lightning.cli.console import global_rank

log = logging.getLogger(__name__)


@cache
def announce_deprecation(old: str, new: str) -> None:
    """Say once per process, on rank 0 only, that something was renamed.

    Args:
        old: The deprecated spelling.
        new: What to write instead.
    """
    if global_rank() == 0:
        log.warning("%s is deprecated and will be removed in 0.3; use %s", old, new)
