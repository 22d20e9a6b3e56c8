"""Describe objectives as plain values, to compare them between ranks and with those of a checkpoint."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from os import PathLike, fspath
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor

from gatera_lightning.objectives.base import Objective

_LARGEST = 100
"""Containers with more entries are described by their length: every checkpoint holds the description."""
_DEEPEST = 4  # settings are not nested deeper, and an object may contain itself


def describe_objectives(objectives: Sequence[Objective]) -> dict[str, Any]:
    """Return the classes and the settings of objectives under their dotted names, as plain values.

    Settings are the arguments of an objective's constructor: the value of the attribute of the same name, if
    there is one, and else what was given. Other attributes may change in training. Numbers, text and
    containers of them are described by their values, a tensor by its shape, dtype and digest, and any other
    object by its class and, for a dataclass, its fields.

    >>> describe_objectives([GateEntropy(0.01)])
    {'model.objectives': ['GateEntropy'], 'model.objectives[0].weight': 0.01}

    Args:
        objectives: What is trained, in order.
    """
    found: dict[str, Any] = {"model.objectives": [type(objective).__qualname__ for objective in objectives]}
    for index, objective in enumerate(objectives):
        for name, given in sorted(objective.given_arguments.items()):
            found[f"model.objectives[{index}].{name}"] = _plain(_attribute(objective, name, given), 1)
    return found


def _attribute(owner: Any, name: str, otherwise: Any) -> Any:
    """The value that an object itself holds under a name; its class may have a method of that name."""
    if isinstance(getattr(type(owner), name, None), MemberDescriptorType):  # one of its __slots__
        return getattr(owner, name, otherwise)
    return vars(owner).get(name, otherwise) if hasattr(owner, "__dict__") else otherwise


def _settings(owner: Any, depth: int) -> dict[str, Any]:
    """The fields of a dataclass that its constructor takes."""
    values = {field.name: _attribute(owner, field.name, None) for field in fields(owner) if field.init}
    return {name: _plain(value, depth + 1) for name, value in sorted(values.items())}


def _plain(value: Any, depth: int) -> Any:
    match value:
        case Enum():
            return str(value)
        case None | bool():
            return value
        case str() if _is_device(value):
            return "a device"  # which differs between ranks
        case int():
            return int(value)  # of subclasses too, which a checkpoint would store as pickled objects
        case float():
            return float(value)
        case str():
            return str(value)
        case PathLike():
            return fspath(value)
        case Tensor():
            return _describe_tensor(value)
        case Mapping() | list() | tuple() | set() | frozenset() if len(value) > _LARGEST:
            return f"{type(value).__qualname__} of {len(value)} entries"
        case Mapping() if depth < _DEEPEST:
            return {str(key): _plain(item, depth + 1) for key, item in value.items()}
        case list() | tuple() if depth < _DEEPEST:
            return [_plain(item, depth + 1) for item in value]
        case set() | frozenset() if depth < _DEEPEST:
            return sorted((_plain(item, depth + 1) for item in value), key=repr)
        case type():
            return value.__qualname__
    described: dict[str, Any] = {"class": type(value).__qualname__}
    if is_dataclass(value) and depth < _DEEPEST:
        described |= _settings(value, depth)
    elif hasattr(value, "__qualname__"):  # a function
        described["name"] = value.__qualname__
    return described


def _is_device(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(cpu|cuda|mps|xpu|meta)(:\d+)?", value) is not None


def _describe_tensor(tensor: Tensor) -> str:
    shape = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.is_meta or tensor.layout != torch.strided:
        return shape
    values = tensor.detach().cpu().double().contiguous().numpy().tobytes()
    return f"{shape} {hashlib.sha256(values).hexdigest()[:16]}"
