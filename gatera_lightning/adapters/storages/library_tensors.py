"""Storages of libraries whose quantized weights are tensor classes: torchao and optimum-quanto."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gatera_lightning.adapters.storages.base import Packed, Storage


class LibraryTensor(Storage):
    """A weight that is stored as the tensor class of a library, which has a method ``dequantize``."""

    tensor_class: ClassVar[str]
    """Name of the class."""

    @abstractmethod
    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize a weight (out, in) by the library."""

    def pack(self, weight: Tensor) -> Packed:
        """Pack a weight (out, in)."""
        return _flattened(self.quantized(weight.detach().float()))

    def unpack(self, packed: Packed, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the dense weight (out, in)."""
        tensor: Any = _rebuilt("", packed)
        dense: Tensor = tensor.dequantize()
        return dense.view(shape).to(dtype)

    def read_layer(self, linear: nn.Linear) -> Packed | None:
        """Return the packed weight of a layer whose weight is of this class."""
        weight = linear._parameters.get("weight")
        if weight is None or type(weight.data).__name__ != self.tensor_class:
            return None
        return _flattened(weight.data)


def _flattened(tensor: Tensor) -> Packed:
    """Take a tensor of any class apart into plain tensors, because not every class can be copied and moved.

    The layout has the class and its context for each path to a tensor class, "" for the outermost.
    """
    parts: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}

    def visit(path: str, tensor: Any) -> None:
        if not is_traceable_wrapper_subclass(tensor):
            parts[path] = tensor
            return
        names, context = tensor.__tensor_flatten__()
        layout[path] = type(tensor), tuple(names), context, tensor.size(), tensor.stride()
        for name in names:
            visit(f"{path}__{name}", getattr(tensor, name))

    visit("", tensor)
    return Packed(parts, layout)


def _rebuilt(path: str, packed: Packed) -> Tensor:
    if path not in packed.layout:
        return packed.parts[path]
    kind, names, context, size, stride = packed.layout[path]
    inner = {name: _rebuilt(f"{path}__{name}", packed) for name in names}
    tensor: Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
    return tensor


class TorchaoInt8(LibraryTensor):
    """``Int8WeightOnlyConfig`` of torchao: integers with a scale for each output."""

    name = "torchao_int8"
    package = "torchao"
    extra = "torchao"
    tensor_class = "Int8Tensor"

    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize a weight (out, in)."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(linear, Int8WeightOnlyConfig())
        return linear.weight.data


class QuantoInt8(LibraryTensor):
    """qint8 of optimum-quanto: integers with a scale for each output."""

    name = "quanto_int8"
    package = "optimum.quanto"
    extra = "quanto"
    tensor_class = "WeightQBytesTensor"

    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize a weight (out, in)."""
        from optimum.quanto import AbsmaxOptimizer, qint8, quantize_weight

        scale = AbsmaxOptimizer()(weight, qtype=qint8, axis=0)
        quantized: Tensor = quantize_weight(weight, qtype=qint8, axis=0, scale=scale)
        return quantized


class QuantoInt4(LibraryTensor):
    """qint4 of optimum-quanto: integers with a scale and an offset for each group of up to 128 inputs."""

    name = "quanto_int4"
    package = "optimum.quanto"
    extra = "quanto"
    tensor_class = "WeightQBitsTensor"

    def quantized(self, weight: Tensor) -> Tensor:
        """Quantize a weight (out, in)."""
        from optimum.quanto import MaxOptimizer, qint4, quantize_weight

        # The library needs a divisor of the number of inputs, and packs pairs.
        group = next((size for size in (128, 64, 32) if weight.shape[1] % size == 0), weight.shape[1])
        scale, shift = MaxOptimizer()(weight, qtype=qint4, axis=0, group_size=group)
        quantized: Tensor = quantize_weight(
            weight, qtype=qint4, axis=0, scale=scale, shift=shift, group_size=group
        )
        return quantized
