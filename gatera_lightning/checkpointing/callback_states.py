"""Which types, shapes and ranges the states of callbacks have in a checkpoint."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gatera_lightning.checkpointing.accepted_values import (
    COUNT,
    INTEGERS,
    MAPPING,
    MAPPINGS,
    NUMBER,
    POSITIVE,
    SCORE,
    TEXT,
    TEXTS,
    Accepted,
    is_count,
    is_number,
    wrong,
)

_BEST = {
    "best_k_models": MAPPING,
    "best_model_score": SCORE,
    "best_model_path": TEXT,
    "kth_best_model_path": TEXT,
    "kth_value": SCORE,
    "last_model_path": TEXT,
    "dirpath": TEXT,
}
"""What a ModelCheckpoint remembers."""

_STOPPING = dict.fromkeys(("wait_count", "stopped_epoch", "patience"), COUNT) | {"best_score": SCORE}
_REASON: Accepted = (lambda value: is_count(value) and value <= 4, "an integer from 0 to 4")
_HISTORY = {"layers": INTEGERS, "steps": INTEGERS, "every": POSITIVE, "readings": COUNT}
_PHASES, _BINS = 2, 50  # of GateStatistics, as every version wrote them


def callback_problems(callbacks: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each entry of a callback's state that has a wrong type, shape or range.

    The callbacks of this project, and those of Lightning that remember something, are known by their names.

    Args:
        callbacks: The entry ``callbacks`` of a checkpoint.
    """
    yield from wrong(callbacks, dict.fromkeys(callbacks, MAPPING), "callbacks.")
    for key, state in callbacks.items():
        place = f"callbacks.{key}."
        # What every ModelCheckpoint has; a callback of somebody else's may use one of the names.
        if "dirpath" in state and ("best_k_models" in state or "best_model_path" in state):
            yield from _best_problems(state, place)
        if not state and key != "RNGState":
            continue  # a callback that is turned off
        if problems := _STATES.get(str(key).partition("{")[0]):  # Lightning adds settings in braces
            yield from problems(state, place)


def random_state_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    """Yield a sentence for each entry of a state of RNGState that cannot be restored.

    Args:
        state: The state.
        place: Its place in the checkpoint, with a dot at the end.
    """
    yield from wrong(state, {"ranks": MAPPINGS}, place)
    for rank, states in enumerate(state["ranks"]):
        own = f"{place}ranks[{rank}]."
        yield from wrong(states, _RANDOM, own)
        yield from wrong(states, dict.fromkeys(("cuda", "mps"), _BYTES), own, required=False)


def _best_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    yield from wrong(state, {"best_model_path": TEXT}, place)
    if "best_model_score" not in state:
        yield f"its entry {place[:-1]} lacks best_model_score"
    yield from wrong(state, _BEST, place, required=False)
    best = state.get("best_k_models") or {}
    yield from wrong(best, dict.fromkeys(best, SCORE), f"{place}best_k_models.")


def _histogram_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    yield from wrong(state, {"logged_step": COUNT, "history": MAPPING}, place, required=False)
    if "bins" in state:
        yield from wrong(state, {"names": TEXTS}, place)
        modules = len(state["names"])
        bins = _counts((_PHASES, modules, _BINS), "integers of at least 0", floating=False)
        sums = _counts((3, _PHASES, modules), "finite numbers", floating=True)
        yield from wrong(state, {"bins": bins, "sums": sums}, place)
    if history := state.get("history"):
        yield from wrong(history, _HISTORY, f"{place}history.")
        columns, layers = len(history["steps"]), len(history["layers"])
        shape = (columns, _PHASES, 2, layers) if columns else (0,)
        shares = _counts(shape, "numbers", floating=True, finite=False)  # NaN: no tokens
        yield from wrong(history, {"shares": shares}, f"{place}history.")


def _stopping_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    yield from wrong(state, _STOPPING, place)
    further = {"stopping_reason": _REASON, "stopping_reason_message": TEXT}
    yield from wrong(state, further, place, required=False)


def _timer_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    yield from wrong(state, {"time_elapsed": MAPPING}, place, required=False)
    elapsed = state.get("time_elapsed") or {}
    yield from wrong(elapsed, dict.fromkeys(elapsed, NUMBER), f"{place}time_elapsed.")


def _overview_problems(state: Mapping[str, Any], place: str) -> Iterator[str]:
    yield from wrong(state, {"written": TEXTS}, place)


_STATES: dict[str, Callable[[Mapping[str, Any], str], Iterator[str]]] = {
    "RNGState": random_state_problems,
    "GateHistogram": _histogram_problems,
    "TensorBoardOverview": _overview_problems,
    "OptionalEarlyStopping": _stopping_problems,
    "EarlyStopping": _stopping_problems,
    "Timer": _timer_problems,
}


def _counts(shape: tuple[int, ...], kind: str, *, floating: bool, finite: bool = True) -> Accepted:
    def accepts(value: Any) -> bool:
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            return False
        if not (value.is_floating_point() if floating else _holds_integers(value)):
            return False
        if value.is_meta or not finite:  # the values of a sharded checkpoint are read later
            return True
        return bool(torch.isfinite(value).all() if floating else (value >= 0).all())

    return accepts, f"a tensor of {kind} and shape {shape}"


def _holds_integers(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1 and len(value) > 0


def _is_torch_state(value: Any) -> bool:
    """Whether a generator can be set to a state; the other tests below ask in the same way."""
    if not _is_bytes(value):
        return False
    if value.is_meta:
        return True
    try:
        torch.Generator().set_state(value.cpu())
    except RuntimeError:
        return False
    return True


def _is_numpy_state(value: Any) -> bool:
    try:
        name, keys, position, has_gauss, gauss = value
        if not isinstance(keys, Tensor) or not _holds_integers(keys) or tuple(keys.shape) != (624,):
            return False
        if not is_count(position) or position > len(keys) or not is_count(has_gauss) or not is_number(gauss):
            return False
        if not keys.is_meta:
            numbers = keys.cpu().numpy().astype(np.uint32)
            np.random.RandomState().set_state((name, numbers, position, has_gauss, gauss))
    except (TypeError, ValueError):
        return False
    return True


def _is_python_state(value: Any) -> bool:
    try:
        version, internal, gauss_next = value
        random.Random().setstate((version, tuple(internal), gauss_next))
    except (TypeError, ValueError, OverflowError):
        return False
    return gauss_next is None or is_number(gauss_next)


_BYTES: Accepted = (_is_bytes, "a tensor of bytes")
_RANDOM: dict[str, Accepted] = {
    "torch": (_is_torch_state, "a random state of torch"),
    "numpy": (_is_numpy_state, "a random state of numpy"),
    "python": (_is_python_state, "a random state of Python"),
}
