"""The environment of the process: variables are checked, and defaults set, before PyTorch is imported."""

import locale
import logging
import math
import os
import re
import sys
import threading
import warnings
from contextlib import suppress
from typing import Any, TextIO

from gatera_lightning.errors import ConfigError, printable

_PORT = ("a port from 1 to 65535", re.compile(r"0*([1-9]\d{0,4})"))
_COUNT = ("an integer of at least 0", re.compile(r"\d+"))
_THREADS = ("a number of threads of at least 1", re.compile(r"0*[1-9]\d*( *, *[1-9]\d*)*"))

_VARIABLES = {
    "MASTER_PORT": _PORT,
    "GROUP_RANK": _COUNT,
    "LOCAL_RANK": _COUNT,
    "LOCAL_WORLD_SIZE": _COUNT,
    "NODE_RANK": _COUNT,
    "PL_GLOBAL_SEED": ("an integer from 0 to 4294967295", re.compile(r"0*\d{1,10}")),
    "RANK": _COUNT,
    "WORLD_SIZE": _COUNT,
    "SLURM_LOCALID": _COUNT,
    "SLURM_NNODES": _COUNT,
    "SLURM_NODEID": _COUNT,
    "SLURM_NTASKS": _COUNT,
    "SLURM_PROCID": _COUNT,
    "SLURM_RESTART_COUNT": _COUNT,
    "MKL_NUM_THREADS": _THREADS,
    "OMP_NUM_THREADS": _THREADS,
}
"""Variable -> what is accepted; the libraries, and this program, read them as numbers."""

_LARGEST = {"MASTER_PORT": 65535, "PL_GLOBAL_SEED": 4294967295}

_DEFAULTS = {
    # A waiting thread of PyTorch's OpenMP spins; beside another process on its core it would spin in vain.
    "OMP_WAIT_POLICY": "PASSIVE",
    "KINETO_LOG_LEVEL": "5",  # the profiler of PyTorch reports missing tracing tools
}


def check_environment() -> None:
    """Refuse environment variables that the libraries would misread or fail on.

    Raises:
        ConfigError: With every variable that cannot work.
    """
    problems = []
    for name, (accepted, pattern) in _VARIABLES.items():
        value = os.environ.get(name)
        if value is None:
            continue
        found = pattern.fullmatch(value.strip())
        if not found or int(found[0].partition(",")[0]) > _LARGEST.get(name, math.inf):
            problems.append(f"{name} (environment variable): {value!r}; accepted: {accepted}, or unset")
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not problems and rank.isdecimal() and size.isdecimal() and int(rank) >= int(size):
        problems.append(f"RANK (environment variable): {rank}, and WORLD_SIZE is {size}; accepted: less")
    if problems:
        raise ConfigError(problems)


def set_up_process(*, show_traceback: bool) -> None:
    """Set defaults of the libraries and make the standard streams safe to write to.

    Args:
        show_traceback: Whether threads and finalizers may print tracebacks.
    """
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        # Under such a locale, libraries would misread configs and data, which are UTF-8.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # lives on
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an encoding such as ASCII lacks some characters
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars are drawn with control characters
    # Warnings that only the authors of other libraries can act on; this package's own name it.
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("default", message=r"gatera_lightning\.", category=FutureWarning)
    warnings.showwarning = _show_warning
    if not show_traceback:
        logging.raiseExceptions = False
        threading.excepthook = _report_thread
        sys.unraisablehook = _ignore_unraisable


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning without control characters: it may quote what others have written."""
    text = warnings.formatwarning(message, category, filename, lineno, line)
    with suppress(OSError, ValueError):  # nobody reads standard error
        (file or sys.stderr).write(printable(text))


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_value is not None and not isinstance(failure.exc_value, SystemExit):
        logging.getLogger(__name__).warning(
            "a background thread failed: %s: %s", failure.exc_type.__name__, failure.exc_value
        )


def _ignore_unraisable(failure: Any) -> None:
    """Drop an error of a finalizer: nothing can be done about it."""
