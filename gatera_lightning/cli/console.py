"""The log on standard error: lines of this package and of Lightning, above a live progress bar."""

import logging
import re
import sys
import warnings
from typing import TextIO

from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from gatera_lightning.errors import printable

# Warnings that a user of this package cannot act on: of our dependencies about each other, and of Lightning
# about a trained adapter that is part of the frozen model.
_IGNORED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",
    ".*does not have many workers",
    r".*module\(s\) in eval mode at the start of training",
    ".*recommended to use `self.log.*sync_dist=True",
    ".*The `srun` command is available on your system but is not used",
)

# Information of Lightning that says nothing about the run, or that the error report says in its own line.
_IGNORED_INFORMATION = re.compile(
    r"(GPU|TPU|HPU) available: False|💡 Tip:|\nDetected KeyboardInterrupt"
    r"|(\[rank: \d+\] )?(Seed set to|Received SIGTERM)"
)


def set_up_console() -> None:
    """Configure log, warnings and progress bars; a log that the caller has configured already stays as it is.

    Rank 0 shows messages from INFO on, every other rank from WARNING on. Call this after the subcommand's
    module is imported: Lightning determines the rank when it is imported.
    """
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    package_log = logging.getLogger("gatera_lightning")
    if not package_log.hasHandlers():
        package_log.addHandler(_StderrHandler())
        package_log.setLevel(logging.WARNING if global_rank() else logging.INFO)
    for name in ("lightning.pytorch", "lightning.fabric"):
        lightning_log = logging.getLogger(name)
        # A plain StreamHandler is the one that Lightning installs itself.
        if any(type(handler) is logging.StreamHandler for handler in lightning_log.handlers):
            lightning_log.handlers = [_StderrHandler()]
    # PEFT imports bitsandbytes, which then warns that an optional kernel is not installed.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    # Progress bars are drawn with control characters, which do not belong in a file. A subcommand that has
    # not imported Transformers draws none.
    if not sys.stderr.isatty() and "transformers" in sys.modules:
        from gatera_lightning.callbacks.progress_bar import disable_library_bars

        disable_library_bars()


def global_rank() -> int:
    """Return the rank of this process in its run; 0 as long as Lightning is not imported."""
    return getattr(rank_zero_only, "rank", 0)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`: a live progress bar replaces it to print lines above itself."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(lambda record: not _IGNORED_INFORMATION.match(record.getMessage()))

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # setStream would flush the previous stream, which may be closed
        super().emit(record)
