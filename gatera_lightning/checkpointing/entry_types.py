"""Which types and ranges the entries of a checkpoint have, as far as the checkpoint alone tells."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from gatera_lightning.checkpointing.accepted_values import (
    COUNT,
    FLOATS,
    INTEGERS,
    KEYS,
    MAPPING,
    MAPPING_OR_TEXT,
    MAPPINGS,
    NUMBER,
    NUMBERS,
    POSITIVE,
    SCORE,
    TENSOR,
    TEXT,
    TEXT_OR_TEXTS,
    TEXTS,
    in_words,
    wrong,
)
from gatera_lightning.checkpointing.callback_states import callback_problems

_ENTRIES = {
    "state_dict": MAPPING,
    "adapter": MAPPING,
    "backbone": MAPPING,
    "epoch": COUNT,
    "global_step": COUNT,
    "loops": MAPPING,
    "callbacks": MAPPING,
    "optimizer_states": MAPPINGS,
    "lr_schedulers": MAPPINGS,
    "hyper_parameters": MAPPING,
    "datamodule_hyper_parameters": MAPPING,
    "run_settings": MAPPING,
    "skipped_steps": COUNT,
    "template": TEXT,
}
"""Entries -> what they hold, if they are there and not null."""

_ADAPTER = {
    "update": TEXT,
    "gate": MAPPING_OR_TEXT,
    "rank": POSITIVE,
    "alpha": NUMBER,
    "dropout": NUMBER,
    "target_modules": TEXT_OR_TEXTS,
    "exclude_modules": TEXTS,
    "layers": INTEGERS,
    "rank_pattern": MAPPING,
    "alpha_pattern": MAPPING,
    "adapter_dtype": TEXT,
    "gate_bias": NUMBER,  # this and what follows: version 0.1
    "gate_entropy_weight": NUMBER,
    "gate_lr_multiplier": NUMBER,
    "skip_below": NUMBER,
    "merge_above": NUMBER,
}
_GATES = ("none", "static", "token")  # those of this project; a gate of a user has settings of its own
_GATE = dict.fromkeys(("bias", "entropy_weight", "lr_multiplier", "skip_below", "merge_above"), NUMBER)
_BACKBONE = dict.fromkeys(
    ("id", "revision", "fingerprint_float16", "quantization", "attn_implementation", "adapter_sha256"), TEXT
)
_OPTIMIZER = {"state": MAPPING, "param_groups": MAPPINGS}
_MOMENTS = {"exp_avg": FLOATS, "exp_avg_sq": FLOATS, "step": SCORE}
_SCHEDULER = {"last_epoch": COUNT, "_step_count": COUNT, "base_lrs": NUMBERS, "_last_lr": NUMBERS}
_FIT_LOOP = {
    "epoch_progress": MAPPING,
    "epoch_loop.batch_progress": MAPPING,
    "epoch_loop.state_dict": MAPPING,
}
_POSITION = {
    "epoch": COUNT,
    "steps": COUNT,
    "micro_batches": COUNT,
    "accumulate": POSITIVE,
    "plan": TEXT,
}


def entry_problems(contents: Mapping[str, Any], *, resumes: bool) -> Iterator[str]:
    """Yield a sentence for each entry of a wrong type or range, with what is accepted.

    The problems are found one after the other, and what follows the first may not be meaningful: the states
    within an entry are read only if the entry is right.

    Args:
        contents: The entries of a checkpoint of an adapter.
        resumes: Whether it has to resume a run; else the states of the run are not read.
    """
    yield from wrong(contents, _ENTRIES, "", required=False)
    yield from wrong(contents["state_dict"], dict.fromkeys(contents["state_dict"], TENSOR), "state_dict.")
    yield from _adapter_problems(contents["adapter"])
    backbone = contents["backbone"]
    yield from wrong(backbone, _BACKBONE, "backbone.", required=False)
    if "fingerprint" in backbone:
        yield from wrong(backbone, {"fingerprint": TEXT}, "backbone.")
    yield from _position_problems(contents)
    yield from callback_problems(contents.get("callbacks") or {})  # evaluation restores them too
    if resumes:
        yield from _loop_problems(contents)
        yield from _optimizer_problems(contents["optimizer_states"])
        for number, state in enumerate(contents["lr_schedulers"]):
            yield from wrong(state, _SCHEDULER, f"lr_schedulers[{number}].", required=False)


def _adapter_problems(adapter: Mapping[str, Any]) -> Iterator[str]:
    nulls = {name for name in ("alpha", "layers") if adapter.get(name) is None}
    settings = {name: _ADAPTER[name] for name in _ADAPTER.keys() & adapter.keys() - nulls}
    yield from wrong(adapter, settings, "adapter.")
    for name, accepted in (("rank_pattern", POSITIVE), ("alpha_pattern", NUMBER)):
        table = adapter.get(name, {})
        yield from wrong(table, dict.fromkeys(table, accepted), f"adapter.{name}.")
    gate = adapter.get("gate")
    if isinstance(gate, Mapping):
        yield from wrong(gate, {"kind": TEXT}, "adapter.gate.")
        if gate["kind"] in _GATES:
            own = {name: accepted for name, accepted in _GATE.items() if name in gate}
            yield from wrong(gate, own, "adapter.gate.")


def _position_problems(contents: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in _with_position(contents):
        yield from wrong(entry, {"train_position": MAPPING}, f"{name}.")
        yield from wrong(entry["train_position"], _POSITION, f"{name}.train_position.")
        for digests in ("examples", "choice"):
            yield from wrong(entry, {digests: MAPPING}, f"{name}.", required=False)
            of_splits = entry.get(digests) or {}
            yield from wrong(of_splits, dict.fromkeys(of_splits, TEXT), f"{name}.{digests}.")


def _with_position(contents: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The states of data modules."""
    return [
        (name, entry)
        for name, entry in contents.items()
        if isinstance(entry, Mapping) and "train_position" in entry
    ]


def _loop_problems(contents: Mapping[str, Any]) -> Iterator[str]:
    loops = contents["loops"]
    yield from wrong(loops, {"fit_loop": MAPPING}, "loops.")
    fit_loop = loops["fit_loop"]
    yield from wrong(fit_loop, _FIT_LOOP, "loops.fit_loop.")
    for name in ("epoch_progress", "epoch_loop.batch_progress"):
        counts = dict.fromkeys(("total", "current"), MAPPING)
        yield from wrong(fit_loop[name], counts, f"loops.fit_loop.{name}.")
    yield from _wrong_counts(loops, "loops")
    yield from wrong(fit_loop, {"state_dict": MAPPING}, "loops.fit_loop.", required=False)
    place = "loops.fit_loop.state_dict"
    states = fit_loop.get("state_dict") or {}
    yield from wrong(states, {"combined_loader": MAPPINGS}, f"{place}.", required=False)
    for number, state in enumerate(states.get("combined_loader") or []):
        if _with_position(contents):  # else the loader is of another kind
            yield from wrong(state, _POSITION, f"{place}.combined_loader[{number}].")


def _optimizer_problems(states: list[Mapping[str, Any]]) -> Iterator[str]:
    for number, state in enumerate(states):
        place = f"optimizer_states[{number}]"
        yield from wrong(state, _OPTIMIZER, f"{place}.")
        for index, group in enumerate(state["param_groups"]):
            yield from wrong(group, {"params": KEYS}, f"{place}.param_groups[{index}].")
        known = set(itertools.chain.from_iterable(group["params"] for group in state["param_groups"]))
        for key, moments in state["state"].items():
            if not isinstance(key, int):
                continue  # of an optimizer that keeps values beside those of its parameters
            if key not in known:
                yield f"its entry {place}.state[{key!r:.40}] is of a parameter that no group lists"
            if not isinstance(moments, Mapping):
                yield f"its entry {place}.state[{key}] is {in_words(moments):.60}; accepted: {MAPPING[1]}"
            found = {name: accepted for name, accepted in _MOMENTS.items() if name in moments}
            yield from wrong(moments, found, f"{place}.state[{key}].")


def _wrong_counts(value: Any, place: str) -> Iterator[str]:
    """Progress that is no number: ``total`` and ``current`` count batches, steps or epochs."""
    if not isinstance(value, Mapping):
        return
    for name, entry in value.items():
        if str(name).endswith(("progress", "state_dict", "total", "current")):
            yield from wrong(value, {name: MAPPING}, f"{place}.")
        if name == "_batches_that_stepped":
            yield from wrong(value, {name: COUNT}, f"{place}.")
        if name in ("total", "current") and isinstance(entry, Mapping):
            yield from wrong(entry, dict.fromkeys(entry, COUNT), f"{place}.{name}.")
        else:
            yield from _wrong_counts(entry, f"{place}.{name}")
