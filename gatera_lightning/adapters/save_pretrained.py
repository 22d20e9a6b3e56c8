"""``model.save_pretrained`` of an adapted model, which writes the adapter and no weights that nothing loads.

Transformers would write the whole model under the names of the adapted layers: no ``from_pretrained`` reads
them, and it would draw the adapted layers' weights at random. The method of the class is replaced once, and
asks the model whether it is adapted. A method on the model itself would refer to it, so that a deleted model
would keep its memory until the garbage collector runs.

A model that was pickled whole and is read by another process replaces the method there.
"""

import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.lookup import (
    adapted_linears,
    adapter_parameters,
    frozen_adapter,
    own_name,
)
from gatera_lightning.errors import ConfigError

_MARK = "_saves_its_adapter"
"""Attribute of models that this package has adapted; those that PEFT adapts are saved by Transformers."""

_MERGE = "merge_adapter(model) first, or the subcommand export --format merged, writes a whole model"
_REFUSED: dict[str, tuple[Any, str]] = {
    "push_to_hub": (False, "accepted: false; model.push_to_hub(repo_id) uploads the adapter"),
    "variant": (None, "accepted: null, because an adapter folder has one weights file"),
    "safe_serialization": (True, "accepted: true, because an adapter is never written as a pickle"),
    "distributed_checkpoint": (False, "accepted: false; every rank calls save_pretrained, and rank 0 writes"),
}


class _Mark:
    """Replaces ``save_pretrained`` of a class of models when it is made, which unpickling does as well."""

    def __init__(self, kind: type[PreTrainedModel]) -> None:
        self._kind = kind
        _replace_method(kind)

    def __reduce__(self) -> tuple[type["_Mark"], tuple[type[PreTrainedModel]]]:
        return _Mark, (self._kind,)


def save_adapter_instead(model: nn.Module) -> None:
    """Let ``save_pretrained`` of an adapted model, and of adapted models inside it, write the adapter."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and adapted_linears(module):
            module.__dict__[_MARK] = _Mark(type(module))


def save_whole_model_again(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model without an adapter write the model."""
    for module in model.modules():
        module.__dict__.pop(_MARK, None)


def _replace_method(kind: type[PreTrainedModel]) -> None:
    """Replace ``save_pretrained`` in the class that a class of models has it from."""
    owner: Any = next(parent for parent in kind.__mro__ if "save_pretrained" in vars(parent))
    save_whole = owner.save_pretrained
    if getattr(save_whole, _MARK, False):
        return

    @functools.wraps(save_whole)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        if vars(self).get(_MARK) and not adapted_linears(self) and frozen_adapter(self) is not None:
            raise ConfigError(
                "save_pretrained: a trained adapter is part of this frozen model, and has a folder of its "
                f"own; accepted: the model without backbone.adapter. {_MERGE}"
            )
        if not vars(self).get(_MARK) or not adapted_linears(self):
            return save_whole(self, save_directory, is_main_process, state_dict, *args, **options)
        if args:
            names = list(inspect.signature(save_whole).parameters)[4:]
            options |= zip(names, args, strict=False)
        return _save_adapter(self, save_directory, is_main_process, state_dict, options)

    setattr(save_pretrained, _MARK, True)
    owner.save_pretrained = save_pretrained


def _save_adapter(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    is_main_process: bool,
    state_dict: Mapping[str, Tensor] | None,
    options: Mapping[str, Any],
) -> None:
    """Write the adapter with :func:`~gatera_lightning.save_adapter`, not the backbone.

    Args:
        model: The adapted model.
        folder: The folder to write.
        is_main_process: Whether this process writes, if there is no process group.
        state_dict: The values to write; they must be the model's own.
        options: Further options of Transformers. Those that would change the files are refused.

    Raises:
        ConfigError: If an option cannot be satisfied. The error names the call that can.
        AdapterFileError: As in :func:`~gatera_lightning.save_adapter`.
    """
    # This module is imported by injection, which saving adapters needs.
    from gatera_lightning.adapters.serialization import save_adapter

    problems = [
        f"save_pretrained: {name}={options[name]!r} with an adapted model; {accepted}"
        for name, (default, accepted) in _REFUSED.items()
        if options.get(name, default) != default
    ]
    if state_dict is not None and not _has_values(model, state_dict):
        problems.append(
            "save_pretrained: state_dict has other values of the adapter than the model; accepted: none, "
            f"or the model's own. {_MERGE}"
        )
    if problems:
        raise ConfigError(problems)
    if is_main_process or torch.distributed.is_initialized():  # gathering needs every rank
        save_adapter(model, os.fspath(folder))


def _has_values(model: nn.Module, state_dict: Mapping[str, Tensor]) -> bool:
    given = {own_name(name): tensor for name, tensor in state_dict.items()}
    return all(
        own_name(name) in given and _equal(given[own_name(name)], parameter)
        for name, parameter in adapter_parameters(model).items()
    )


def _equal(given: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether two tensors are equal; a sharded one is not compared, because others may not compare."""
    own = parameter.detach()
    if type(own) is not Tensor and type(own) is not nn.Parameter:
        return True
    return given.shape == own.shape and torch.equal(given.to(own.device, own.dtype), own)
