"""Every exception as an exit code and a message: what was being done, what failed, and what to do about it.

Exceptions are translated by the layer that raises them (this package, the operating system, PyTorch,
libraries), not one by one. Anything unknown becomes a sentence too; its traceback is one switch away.
"""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gatera_lightning.cli.exit_codes import ExitCode
from gatera_lightning.errors import (
    AdapterFileError,
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    Preempted,
)

_INNERMOST = re.compile(r"\b(?:Namespace|NestedArg|dict|OrderedDict)\(([^()]*)\)")
_OBJECT = re.compile(
    r"<(?:(?:function )?([\w.]+)[^<>]*? at 0x[0-9a-fA-F]+|bound method ([\w.]+) of [^<>]*"
    r"|(?:class|enum) '([\w.]+)')>"
)
_WORDS = {"None": "null", "True": "true", "False": "false"}


class ParseError(ConfigError):
    """A command line or a config that cannot be parsed; all ranks read the same one."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem, on_every_rank=True)


def without_internals(text: str) -> str:
    """Write Python's and jsonargparse's objects in a message as a config does.

    >>> without_internals("Namespace(class_path='a.B', init_args=Namespace(c=None))")
    "{class_path: 'a.B', init_args: {c: null}}"

    ``<a.B object at 0x7f…>`` becomes ``a.B``.
    """
    before = ""
    while before != text:  # from the inside
        before = text
        text = _INNERMOST.sub(_as_mapping, _OBJECT.sub(lambda found: found[1] or found[2] or found[3], text))
    return re.sub(r"\b(?:Namespace|NestedArg)\b", "settings", text)  # cut off, or with brackets in a text


def _as_mapping(found: re.Match[str]) -> str:
    if nested := re.fullmatch(r"key='([^']*)', val=(.*)", found[1]):
        return f"{{{nested[1]}: {nested[2]}}}"
    entries = re.sub(r"\b(\w+)=", r"\1: ", found[1])
    return f"{{{re.sub(r': (None|True|False)(?![^,}])', lambda word: f': {_WORDS[word[1]]}', entries)}}}"


@dataclass(frozen=True)
class Translation:
    """What the user is told about an exception."""

    code: ExitCode
    lines: tuple[str, ...]
    on_every_rank: bool = False
    """Whether all ranks raise it together, so that only rank 0 needs to print it."""


_ACTIVITIES = {
    "adapters": "adapting the model",
    "adapters.serialization": "reading or writing an adapter folder",
    "backbone": "loading the backbone",
    "callbacks": "running callbacks",
    "checkpointing": "reading or writing a checkpoint",
    "cost_model": "estimating the costs",
    "datamodules": "reading the data",
    "distributed": "communicating with other ranks",
    "evaluation": "evaluating",
    "gate_analysis": "analyzing gates",
    "generation": "generating text",
    "objectives": "computing the loss",
    "training": "running the model",
}
"""Package or module below this one -> what it was doing when an exception passed through it."""

_ADVICE = {
    errno.ENOSPC: "free some space on that disk, or write to another folder",
    errno.EDQUOT: "your quota is used up: delete files, or write to another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check the permissions, or choose another path",
    errno.EPERM: "check the permissions, or choose another path",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use fewer data workers",
    errno.ENFILE: "this machine has no file handles left",
    errno.ENOMEM: "use a smaller batch, or a machine with more memory",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file instead of a folder",
    errno.ELOOP: "check the symbolic links of the path",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
}

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.I)
_LOST_RANK = re.compile(
    r"gloo|NCCL|Connection (closed|reset) by peer|ProcessGroup|store.*(timeout|closed)|Socket Timeout", re.I
)
_LESS_MEMORY = (
    "use a smaller data.init_args.batch_size with more trainer.accumulate_grad_batches, a smaller "
    "data.init_args.max_length, or model.backbone.gradient_checkpointing; "
    "`estimate` predicts what a step needs"
)
_BUG = "run it again with --traceback for the details, and please report it if the message is of no help"


def translate(error: BaseException, command: str) -> Translation:
    """Translate an exception.

    Args:
        error: What a subcommand raised; no SystemExit.
        command: The subcommand, such as ``fit``; empty if none was recognized.
    """
    told = _translate(error, command)
    return replace(told, lines=tuple(map(without_internals, told.lines)))


def _translate(error: BaseException, command: str) -> Translation:
    match error:
        case ParseError():
            return Translation(ExitCode.USAGE, (str(error),), on_every_rank=True)
        case ConfigError():
            count = len(error.problems)
            heading = f"{count} problem{'' if count == 1 else 's'} in the configuration:"
            lines = (heading, *(f"  - {problem}" for problem in error.problems))
            return Translation(ExitCode.USAGE, lines, error.on_every_rank)
        case AdapterFileError():
            return Translation(ExitCode.USAGE, (str(error),))
        case NonFiniteLossError() | CheckpointError():  # raised by all ranks together
            return Translation(ExitCode.FAILURE, (str(error),), on_every_rank=True)
        case Preempted():
            code = ExitCode.SUCCESS if error.requeued else ExitCode.TRY_AGAIN
            return Translation(code, (str(error),), on_every_rank=True)
    if type(error).__name__ == "DistNetworkError":  # importing it would import torch
        return Translation(ExitCode.FAILURE, _rendezvous(error))
    failed, advice = _fault(error)
    activity = _activity(error)
    beginning = f"{command or 'the program'} failed" + (f" while {activity}" if activity else "")
    return Translation(ExitCode.FAILURE, (f"{beginning}: {failed}; {advice}",))


def _fault(error: BaseException) -> tuple[str, str]:
    """What failed, and what to do."""
    text = one_line(error)
    origin = type(error).__module__.partition(".")[0]
    match error:
        case MemoryError():
            return f"out of memory{_colon(text)}", _LESS_MEMORY
        case RecursionError():
            return "its input is nested too deep", "check the depth of configs, rows and templates"
        case ImportError():
            missing = (error.name or "").partition(".")[0]
            return text, f"install {missing or 'what it names'} if you need this feature" if missing else _BUG
        case UnicodeDecodeError():
            return f"a file is not UTF-8: {text}", "convert it to UTF-8"
        case OSError(errno=int()) if error.errno in _ADVICE:
            return _describe_os_error(error), _ADVICE[error.errno]
    if _OUT_OF_MEMORY.search(text):
        return f"out of memory: {text}", _LESS_MEMORY
    if origin == "huggingface_hub" or "huggingface.co" in text:
        return text, "check the name, the network and `hf auth login`; HF_HUB_OFFLINE=1 uses the cache alone"
    if isinstance(error, ConnectionError | TimeoutError) or origin in ("requests", "httpx", "urllib3"):
        return f"network: {text}", "check the network; HF_HUB_OFFLINE=1 uses the cache alone"
    if origin in ("safetensors", "safetensors_rust"):
        return f"a .safetensors file is damaged: {text}", "download or write it again"
    if type(error).__name__ == "MisconfigurationException":
        return text, "change the setting that it names"
    if isinstance(error, RuntimeError) and _LOST_RANK.search(text):
        reason = re.sub(r"^\[\S+:\d+\] ?", "", text).partition(". This is typically")[0]
        advice = (
            "the message of that rank says why; without one, something killed it, such as a lack of memory"
        )
        return f"lost the connection to another rank ({reason})", advice
    if isinstance(error, OSError):
        return text, "check the path, the network and the permissions"
    return f"{type(error).__name__}{_colon(text)}", _BUG


def one_line(error: BaseException, longest: int = 400) -> str:
    """Return the message of an exception in one line, without the traceback of another process in it."""
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of a data worker or of another rank
        text = f"{text.strip().splitlines()[-1]}"
    text = " ".join(text.split()).rstrip(".;: ")
    return text if len(text) <= longest else f"{text[:longest]}…"


def _describe_os_error(error: OSError) -> str:
    names = " -> ".join(repr(str(name)) for name in (error.filename, error.filename2) if name is not None)
    reason = os.strerror(error.errno or 0).lower()
    return f"{names}: {reason}" if names else reason


def _rendezvous(error: BaseException) -> tuple[str, ...]:
    address = os.environ.get("MASTER_ADDR", "this machine")
    port = os.environ.get("MASTER_PORT", "unknown")
    return (
        f"rendezvous failed at {address}, port {port}: {str(error).splitlines()[0]}",
        "  - another job may use the port: set MASTER_PORT to a free one",
    )


def _activity(error: BaseException) -> str:
    """What the innermost function of this package was doing; empty if the traceback does not tell."""
    modules = [
        name.removeprefix("gatera_lightning.")
        for name in _modules(error)
        if name.startswith("gatera_lightning.")
    ]
    for module in reversed(modules):
        parts = module.split(".")
        for length in range(len(parts), 0, -1):
            if activity := _ACTIVITIES.get(".".join(parts[:length])):
                return activity
    return ""


def _modules(error: BaseException) -> Iterator[str]:
    """The modules on an exception's traceback, from the outermost."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame.f_globals.get("__name__", "")
        step = step.tb_next


def _colon(text: str) -> str:
    return f": {text}" if text else ""
