"""Which types and ranges the entries of a checkpoint have, as far as the checkpoint alone tells."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_Accepted = tuple[Callable[[Any], bool], str]  # a test of a value, and what it accepts in words


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_score(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


_COUNT: _Accepted = (_is_count, "an integer of at least 0")
_FLOATS: _Accepted = (
    lambda value: isinstance(value, Tensor) and value.is_floating_point(),
    "a tensor of floating-point numbers",
)
_INTEGERS: _Accepted = (_list_of(lambda value: type(value) is int), "a list of integers")
_KEYS: _Accepted = (_list_of(lambda value: type(value) in (int, str)), "a list of integers or names")
_MAPPING: _Accepted = (_is_mapping, "a mapping")
_MAPPINGS: _Accepted = (_list_of(_is_mapping), "a list of mappings")
_MAPPING_OR_TEXT: _Accepted = (lambda value: _is_mapping(value) or _is_text(value), "a mapping or text")
_NUMBER: _Accepted = (_is_number, "a number")
_NUMBERS: _Accepted = (_list_of(_is_score), "a list of numbers")
_POSITIVE: _Accepted = (lambda value: _is_count(value) and value > 0, "an integer of at least 1")
_SCORE: _Accepted = (_is_score, "a number, or a tensor of one number")
_TENSOR: _Accepted = (lambda value: isinstance(value, Tensor), "a tensor")
_TEXT: _Accepted = (_is_text, "text")
_TEXTS: _Accepted = (_list_of(_is_text), "a list of texts")
_TEXT_OR_TEXTS: _Accepted = (lambda value: _is_text(value) or _TEXTS[0](value), "text or a list of texts")

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

_ADAPTER = {
    "update": _TEXT,
    "gate": _MAPPING_OR_TEXT,
    "rank": _POSITIVE,
    "alpha": _NUMBER,
    "dropout": _NUMBER,
    "target_modules": _TEXT_OR_TEXTS,
    "exclude_modules": _TEXTS,
    "layers": _INTEGERS,
    "rank_pattern": _MAPPING,
    "alpha_pattern": _MAPPING,
    "adapter_dtype": _TEXT,
    "gate_bias": _NUMBER,  # this and what follows: version 0.1
    "gate_entropy_weight": _NUMBER,
    "gate_lr_multiplier": _NUMBER,
    "skip_below": _NUMBER,
    "merge_above": _NUMBER,
}
_GATES = ("none", "static", "token")  # those of this project; a gate of a user has settings of its own
_GATE = dict.fromkeys(("bias", "entropy_weight", "lr_multiplier", "skip_below", "merge_above"), _NUMBER)
_BACKBONE = dict.fromkeys(
    ("id", "revision", "fingerprint_float16", "quantization", "attn_implementation"), _TEXT
)
_OPTIMIZER = {"state": _MAPPING, "param_groups": _MAPPINGS}
_MOMENTS = {"exp_avg": _FLOATS, "exp_avg_sq": _FLOATS, "step": _SCORE}
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
    "accumulate": _POSITIVE,
    "plan": _TEXT,
}
_BEST = {
    "best_k_models": _MAPPING,
    "best_model_score": _SCORE,
    "best_model_path": _TEXT,
    "kth_best_model_path": _TEXT,
    "kth_value": _SCORE,
    "last_model_path": _TEXT,
    "dirpath": _TEXT,
}
"""What a ModelCheckpoint remembers."""


def entry_problems(contents: Mapping[str, Any], *, resumes: bool) -> Iterator[str]:
    """Yield a sentence for each entry of a wrong type or range, with what is accepted.

    The problems are found one after the other, and what follows the first may not be meaningful: the states
    within an entry are read only if the entry is right.

    Args:
        contents: The entries of a checkpoint of an adapter.
        resumes: Whether it has to resume a run; else the states of the run are not read.
    """
    yield from _wrong(contents, _ENTRIES, "", required=False)
    yield from _wrong(contents["state_dict"], dict.fromkeys(contents["state_dict"], _TENSOR), "state_dict.")
    yield from _adapter_problems(contents["adapter"])
    backbone = contents["backbone"]
    yield from _wrong(backbone, _BACKBONE, "backbone.", required=False)
    if "fingerprint" in backbone:
        yield from _wrong(backbone, {"fingerprint": _TEXT}, "backbone.")
    yield from _position_problems(contents)
    if resumes:
        yield from _loop_problems(contents)
        yield from _callback_problems(contents["callbacks"])
        yield from _optimizer_problems(contents["optimizer_states"])
        for number, state in enumerate(contents["lr_schedulers"]):
            yield from _wrong(state, _SCHEDULER, f"lr_schedulers[{number}].", required=False)


def _adapter_problems(adapter: Mapping[str, Any]) -> Iterator[str]:
    nulls = {name for name in ("alpha", "layers") if adapter.get(name) is None}
    settings = {name: _ADAPTER[name] for name in _ADAPTER.keys() & adapter.keys() - nulls}
    yield from _wrong(adapter, settings, "adapter.")
    for name, accepted in (("rank_pattern", _POSITIVE), ("alpha_pattern", _NUMBER)):
        table = adapter.get(name, {})
        yield from _wrong(table, dict.fromkeys(table, accepted), f"adapter.{name}.")
    gate = adapter.get("gate")
    if isinstance(gate, Mapping):
        yield from _wrong(gate, {"kind": _TEXT}, "adapter.gate.")
        if gate["kind"] in _GATES:
            own = {name: accepted for name, accepted in _GATE.items() if name in gate}
            yield from _wrong(gate, own, "adapter.gate.")


def _position_problems(contents: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in _with_position(contents):
        yield from _wrong(entry, {"train_position": _MAPPING}, f"{name}.")
        yield from _wrong(entry["train_position"], _POSITION, f"{name}.train_position.")
        for digests in ("examples", "choice"):
            yield from _wrong(entry, {digests: _MAPPING}, f"{name}.", required=False)
            of_splits = entry.get(digests) or {}
            yield from _wrong(of_splits, dict.fromkeys(of_splits, _TEXT), f"{name}.{digests}.")


def _with_position(contents: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The states of data modules."""
    return [
        (name, entry)
        for name, entry in contents.items()
        if isinstance(entry, Mapping) and "train_position" in entry
    ]


def _loop_problems(contents: Mapping[str, Any]) -> Iterator[str]:
    loops = contents["loops"]
    yield from _wrong(loops, {"fit_loop": _MAPPING}, "loops.")
    fit_loop = loops["fit_loop"]
    yield from _wrong(fit_loop, _FIT_LOOP, "loops.fit_loop.")
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        counts = dict.fromkeys(("total", "current"), _MAPPING)
        yield from _wrong(fit_loop[name], counts, f"loops.fit_loop.{name}.")
    yield from _wrong_counts(loops, "loops")
    yield from _wrong(fit_loop, {"state_dict": _MAPPING}, "loops.fit_loop.", required=False)
    place = "loops.fit_loop.state_dict"
    states = fit_loop.get("state_dict") or {}
    yield from _wrong(states, {"combined_loader": _MAPPINGS}, f"{place}.", required=False)
    for number, state in enumerate(states.get("combined_loader") or []):
        if _with_position(contents):  # else the loader is of another kind
            yield from _wrong(state, _POSITION, f"{place}.combined_loader[{number}].")


def _callback_problems(callbacks: Mapping[str, Any]) -> Iterator[str]:
    yield from _wrong(callbacks, dict.fromkeys(callbacks, _MAPPING), "callbacks.")
    for name, state in callbacks.items():
        # What every ModelCheckpoint has; a callback of somebody else's may use one of the names.
        if "dirpath" in state and ("best_k_models" in state or "best_model_path" in state):
            place = f"callbacks.{name}."
            yield from _wrong(state, {"best_model_path": _TEXT}, place)
            if "best_model_score" not in state:
                yield f"its entry {place[:-1]} lacks best_model_score"
            yield from _wrong(state, _BEST, place, required=False)
            best = state.get("best_k_models") or {}
            yield from _wrong(best, dict.fromkeys(best, _SCORE), f"{place}best_k_models.")


def _optimizer_problems(states: list[Mapping[str, Any]]) -> Iterator[str]:
    for number, state in enumerate(states):
        place = f"optimizer_states[{number}]"
        yield from _wrong(state, _OPTIMIZER, f"{place}.")
        for index, group in enumerate(state["param_groups"]):
            yield from _wrong(group, {"params": _KEYS}, f"{place}.param_groups[{index}].")
        known = set(itertools.chain.from_iterable(group["params"] for group in state["param_groups"]))
        for key, moments in state["state"].items():
            if not isinstance(key, int):
                continue  # of an optimizer that keeps values beside those of its parameters
            if key not in known:
                yield f"its entry {place}.state[{key!r:.40}] is of a parameter that no group lists"
            if not isinstance(moments, Mapping):
                yield f"its entry {place}.state[{key}] is {_in_words(moments):.60}; accepted: {_MAPPING[1]}"
            found = {name: accepted for name, accepted in _MOMENTS.items() if name in moments}
            yield from _wrong(moments, found, f"{place}.state[{key}].")


def _wrong(
    entries: Mapping[str, Any], accepted: Mapping[Any, _Accepted], place: str, *, required: bool = True
) -> Iterator[str]:
    for name, (accepts, description) in accepted.items():
        value = entries.get(name)
        if (required or value is not None) and not accepts(value):
            yield f"its entry {place}{name} is {_in_words(value):.60}; accepted: {description}"


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" if isinstance(value, Mapping | list) else repr(value)


def _wrong_counts(value: Any, place: str) -> Iterator[str]:
    """Progress that is no number: ``total`` and ``current`` count batches, steps or epochs."""
    if not isinstance(value, Mapping):
        return
    for name, entry in value.items():
        if str(name).endswith(("progress", "state_dict", "total", "current")):
            yield from _wrong(value, {name: _MAPPING}, f"{place}.")
        if name == "_batches_that_stepped":
            yield from _wrong(value, {name: _COUNT}, f"{place}.")
        if name in ("total", "current") and isinstance(entry, Mapping):
            yield from _wrong(entry, dict.fromkeys(entry, _COUNT), f"{place}.{name}.")
        else:
            yield from _wrong_counts(entry, f"{place}.{name}")
