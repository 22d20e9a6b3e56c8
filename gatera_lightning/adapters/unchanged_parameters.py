"""Notice that parameters changed after something was computed from them."""

import torch
from torch import nn


class UnchangedParameters:
    """Remembers the parameters of some modules, and raises if they change.

    Every change in place counts (an optimizer step, ``load_state_dict``, ``copy_``), and so does a replaced
    parameter or memory (``assign=True``, ``to``). A write through ``parameter.data`` cannot be noticed.

    Args:
        modules: The modules; their children count as well.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._seen = [
            (child._parameters, name, parameter, _version(parameter), parameter.data_ptr())
            for module in modules
            for child in module.modules()
            for name, parameter in child._parameters.items()
            if parameter is not None
        ]

    def check(self) -> None:
        """Raise RuntimeError if a parameter changed."""
        if torch.compiler.is_compiling():  # cannot be traced
            return
        for owner, name, parameter, version, address in self._seen:
            same = owner.get(name) is parameter and parameter.data_ptr() == address
            if not same or _version(parameter) != version:
                raise RuntimeError(
                    f"a parameter ({name}) of an adapted layer changed inside prepared_for_inference, whose "
                    "cached products belong to the old values; leave the block before you load, train, cast "
                    "or move the adapter"
                )


def _version(parameter: nn.Parameter) -> int:
    return 0 if parameter.is_inference() else parameter._version  # inference tensors do not count versions
