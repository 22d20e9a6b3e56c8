"""Checks of the Trainer's numbers: values without an effect, or with a surprising one, are refused."""

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    accepted: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _at_least(least: int, *others: int) -> Callable[[Any], bool]:
    return lambda value: _is_int(value) and (value >= least or value in others)


def _is_share(value: Any) -> bool:
    return isinstance(value, float) and 0 < value <= 1


_AT_LEAST_1 = _Rule(_at_least(1), "an integer of at least 1")
_SOME_BATCHES = _Rule(
    lambda value: _is_share(value) or _at_least(1)(value),
    "a number of batches of at least 1, or a share above 0.0 and at most 1.0",
)
_ANY_BATCHES = _Rule(
    lambda value: value == 0 or _SOME_BATCHES.holds(value), "0 for none, " + _SOME_BATCHES.accepted
)

_RULES = {
    "accumulate_grad_batches": _AT_LEAST_1,
    "check_val_every_n_epoch": _Rule(_at_least(1), "an integer of at least 1, or null"),
    "gradient_clip_val": _Rule(
        lambda value: isinstance(value, int | float) and 0 <= value < math.inf,
        "a number of at least 0, or null",
    ),
    "limit_train_batches": _SOME_BATCHES,
    "limit_val_batches": _ANY_BATCHES,
    "limit_test_batches": _ANY_BATCHES,
    "limit_predict_batches": _ANY_BATCHES,
    "log_every_n_steps": _Rule(
        _at_least(1), "an integer of at least 1; trainer.logger false turns logging off"
    ),
    "max_epochs": _Rule(_at_least(1, -1), "an integer of at least 1, or -1 for no limit"),
    "max_steps": _Rule(_at_least(1, -1), "an integer of at least 1, or -1 for no limit"),
    "min_epochs": _Rule(_at_least(0), "an integer of at least 0, or null"),
    "min_steps": _Rule(_at_least(0), "an integer of at least 0, or null"),
    "num_nodes": _AT_LEAST_1,
    "num_sanity_val_steps": _Rule(_at_least(0, -1), "an integer of at least 0, or -1 for all batches"),
    "overfit_batches": _Rule(
        lambda value: value == 0,
        "0, because the order of the steps changes in every epoch; to train on few examples, slice "
        "data.train, such as [everyday[:16]]",
    ),
    "reload_dataloaders_every_n_epochs": _Rule(
        lambda value: value == 0, "0, because every epoch already has an order of its own"
    ),
    "val_check_interval": _Rule(
        lambda value: _is_share(value) or _at_least(1)(value),
        "a number of micro-batches of at least 1, or a share of an epoch above 0.0 and at most 1.0",
    ),
}
"""Setting of the Trainer -> which values it may have; None is always the default."""

STAGE_LIMITS = {
    "fit": "limit_train_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
"""Subcommand -> the limit that must leave it something to do."""


def number_problems(settings: Mapping[str, Any], stage: str) -> list[str]:
    """Return one message for every number that cannot work, or that would have no effect.

    Args:
        settings: Settings of the Trainer, by name; those without a rule are ignored.
        stage: fit, validate, test or predict.
    """
    rules = _RULES | ({STAGE_LIMITS[stage]: _SOME_BATCHES} if stage in STAGE_LIMITS else {})
    return [
        f"trainer.{name}: {settings[name]!r}; accepted: {rule.accepted}"
        for name, rule in rules.items()
        if settings.get(name) is not None
        and not isinstance(settings[name], str | dict)  # a time, which has a check of its own
        and not rule.holds(settings[name])
    ]


def time_problems(max_time: Any) -> list[str]:
    """Refuse a time that ends a run before its first step, or that is none.

    Args:
        max_time: ``trainer.max_time``: text, a mapping or a timedelta; null for no limit.
    """
    if max_time is None:
        return []
    try:
        if Timer(duration=max_time).time_remaining() > 0:  # type: ignore[operator]  # None without a duration
            return []
    except (MisconfigurationException, AttributeError, TypeError, OverflowError):
        pass
    shown = str(max_time) if isinstance(max_time, timedelta) else repr(max_time)
    return [
        f"trainer.max_time: {shown}; accepted: a time above 0, as DD:HH:MM:SS or {{hours: 1}}, or null for "
        "no limit"
    ]


def device_problems(devices: Any) -> list[str]:
    """Refuse a number of devices that leaves nothing to run on.

    Args:
        devices: ``trainer.devices``: a number, text with a number or with indices, or a list of indices.
    """
    text = str(devices).strip()
    if devices == [] or text in ("0", "") or (text.startswith("-") and text != "-1"):
        return [
            f"trainer.devices: {devices!r}; accepted: an integer of at least 1, -1 for all, auto, or a list"
        ]
    return []


def seed_problems(seed: Any) -> list[str]:
    """Refuse a seed that NumPy does not accept.

    Args:
        seed: ``seed_everything``: a number, true for a default one, or false for none.
    """
    if isinstance(seed, bool) or seed is None or 0 <= seed < 2**32:
        return []
    return [f"seed_everything: {seed}; accepted: an integer from 0 to {2**32 - 1}, true or false"]
