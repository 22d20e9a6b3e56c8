"""Read what a checkpoint says about its run, and nothing that belongs to another program."""

import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gatera_lightning.checkpointing.integrity import find_corruption, one_line
from gatera_lightning.checkpointing.sharded_format import REST
from gatera_lightning.errors import CheckpointError

_Accepted = tuple[Callable[[Any], bool], str]  # a test of a value, and what it accepts in words


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _has_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_mapping, value))


_COUNT: _Accepted = (_is_count, "an integer of at least 0")
_MAPPING: _Accepted = (_is_mapping, "a mapping")
_MAPPINGS: _Accepted = (_has_mappings, "a list of mappings")
_NUMBERS: _Accepted = (
    lambda value: isinstance(value, list) and all(type(item) in (int, float) for item in value),
    "a list of numbers",
)
_TEXT: _Accepted = (lambda value: isinstance(value, str), "text")

_ENTRIES = {
    "state_dict": _MAPPING,
    "adapter": _MAPPING,
    "backbone": _MAPPING,
    "epoch": _COUNT,
    "global_step": _COUNT,
    "loops": _MAPPING,
    "callbacks": _MAPPING,
    "optimizer_states": _MAPPINGS,
    "lr_schedulers": _MAPPINGS,
    "hyper_parameters": _MAPPING,
    "datamodule_hyper_parameters": _MAPPING,
    "run_settings": _MAPPING,
    "skipped_steps": _COUNT,
    "template": _TEXT,
}
"""Entries -> what they hold, if they are there and not null."""

_OPTIMIZER = {"state": _MAPPING, "param_groups": _MAPPINGS}
_SCHEDULER = {"last_epoch": _COUNT, "_step_count": _COUNT, "base_lrs": _NUMBERS, "_last_lr": _NUMBERS}
_FIT_LOOP = {
    "epoch_progress": _MAPPING,
    "epoch_loop.batch_progress": _MAPPING,
    "epoch_loop.state_dict": _MAPPING,
}
_POSITION = {
    "epoch": _COUNT,
    "steps": _COUNT,
    "micro_batches": _COUNT,
    "accumulate": (lambda value: _is_count(value) and value > 0, "an integer of at least 1"),
    "plan": _TEXT,
}

_ADAPTER_ENTRIES = ("state_dict", "adapter", "backbone")
"""Entries that every checkpoint of an adapter has."""

_RESUME_ENTRIES = ("global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")
"""Entries that resuming a run needs as well."""

_BACKBONE_ENTRIES = ("id", "revision", "fingerprint")


def read_contents(path: Path) -> dict[str, Any]:
    """Read a checkpoint without its sharded tensors, and unpickle nothing but plain values and tensors.

    Args:
        path: A checkpoint file, or the folder of a sharded checkpoint.

    Returns:
        The entries. Tensors of a file stay on the disk until they are used; text stands for sharded ones.

    Raises:
        CheckpointError: The checkpoint is missing, unreadable or corrupt, or holds other classes.
    """
    if problem := find_corruption(path):
        raise CheckpointError(f"{path}: {problem}")
    file = path / REST if path.is_dir() else path
    try:
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise not_allowed(path, error) from error
    except Exception as error:  # another program's archive may raise anything
        raise CheckpointError(f"{path}: it cannot be read ({one_line(error)})") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path}: it holds a {type(contents).__name__}, not a checkpoint")
    return contents


def check_entries(contents: dict[str, Any], source: str | Path, *, resumes: bool = False) -> None:
    """Check that a checkpoint holds an adapter and says where it belongs.

    Args:
        contents: The entries of the checkpoint.
        source: Where it is stored, for the error message.
        resumes: Whether it has to resume a run, so that the weights alone are not enough.

    Raises:
        CheckpointError: An entry is missing or has another type.
    """
    if missing := _missing(contents, _ADAPTER_ENTRIES):
        raise CheckpointError(
            f"{source}: this is not a checkpoint of an adapter; it lacks {', '.join(missing)}"
        )
    if resumes and (missing := _missing(contents, _RESUME_ENTRIES)):
        raise CheckpointError(
            f"{source}: this checkpoint cannot resume a run; it lacks {', '.join(missing)}. A new run can "
            "start from an adapter folder with model.warm_start"
        )
    problems = itertools.chain(
        _wrong(contents, _ENTRIES, "", required=False), _state_problems(contents, resumes)
    )
    if problem := next(problems, None):  # lazily: the states are read only if their entries are right
        raise CheckpointError(f"{source}: the checkpoint is corrupt: {problem}")
    if missing := [name for name in _BACKBONE_ENTRIES if name not in contents["backbone"]]:
        raise CheckpointError(f"{source}: its entry backbone lacks {', '.join(missing)}")


def not_allowed(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint that holds other classes than plain values and tensors."""
    return CheckpointError(f"{path}: it contains pickled classes that are not allowed ({one_line(error)})")


def _missing(contents: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if contents.get(name) is None]


def _state_problems(contents: Mapping[str, Any], resumes: bool) -> Iterator[str]:
    """Problems within the entries, whose own types are right."""
    for name, entry in contents.items():
        if isinstance(entry, Mapping) and "train_position" in entry:
            place = f"{name}.train_position"
            yield from _wrong(entry, {"train_position": _MAPPING}, f"{name}.")
            yield from _wrong(entry["train_position"], _POSITION, f"{place}.")
            yield from _wrong(entry, {"examples": _MAPPING}, f"{name}.", required=False)
            if examples := entry.get("examples"):
                yield from _wrong(examples, dict.fromkeys(examples, _TEXT), f"{name}.examples.")
    if not resumes:
        return
    loops = contents["loops"]
    yield from _wrong(loops, {"fit_loop": _MAPPING}, "loops.")
    yield from _wrong(loops["fit_loop"], _FIT_LOOP, "loops.fit_loop.")
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        yield from _wrong(
            loops["fit_loop"][name], dict.fromkeys(("total", "current"), _MAPPING), f"loops.fit_loop.{name}."
        )
    yield from _wrong_counts(loops, "loops")
    yield from _wrong(contents["callbacks"], dict.fromkeys(contents["callbacks"], _MAPPING), "callbacks.")
    for number, state in enumerate(contents["optimizer_states"]):
        yield from _wrong(state, _OPTIMIZER, f"optimizer_states[{number}].")
    for number, state in enumerate(contents["lr_schedulers"]):
        yield from _wrong(state, _SCHEDULER, f"lr_schedulers[{number}].", required=False)


def _wrong(
    entries: Mapping[str, Any], accepted: Mapping[str, _Accepted], place: str, *, required: bool = True
) -> Iterator[str]:
    for name, (accepts, description) in accepted.items():
        value = entries.get(name)
        if (required or value is not None) and not accepts(value):
            found = f"a {type(value).__name__}" if isinstance(value, Mapping | list) else repr(value)
            yield f"its entry {place}{name} is {found:.60}; accepted: {description}"


def _wrong_counts(value: Any, place: str) -> Iterator[str]:
    """Progress that is no number: ``total`` and ``current`` count batches, steps or epochs."""
    if not isinstance(value, Mapping):
        return
    for name, entry in value.items():
        if name in ("total", "current") and isinstance(entry, Mapping):
            yield from _wrong(entry, dict.fromkeys(entry, _COUNT), f"{place}.{name}.")
        else:
            yield from _wrong_counts(entry, f"{place}.{name}")
