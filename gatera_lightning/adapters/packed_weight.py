"""A frozen weight that is stored in fewer bits and looks like a dense tensor.

Every operation on it runs on a dense copy that lives as long as the operation. ``F.linear`` makes the copy
again in its backward pass, so autograd saves only what is packed.
"""

from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from gatera_lightning.adapters.kernels.autocast import autocast_disabled, matmul_dtype
from gatera_lightning.adapters.kernels.differentiation import first_order_only, transforms_are_active
from gatera_lightning.adapters.storages import STORAGES
from gatera_lightning.adapters.storages.base import Packed

aten = torch.ops.aten
_SAME_VALUES = (aten.detach.default, aten.alias.default, aten.clone.default)
_PART = "packed_"


class PackedWeight(Tensor):
    """A weight (out, in) that a :class:`~gatera_lightning.adapters.storages.Storage` has packed.

    Its ``dtype`` is that of the dense copies. It cannot be written to.

    Attributes:
        storage_name: Name of the storage.
        fingerprint: The :class:`~gatera_lightning.adapters.fingerprint.WeightFingerprint` of the weight
            before it was packed; None if it has only been seen packed.
    """

    storage_name: str
    fingerprint: Any
    _layout: Any
    _part_names: list[str]

    @staticmethod
    def __new__(
        cls, storage: str, packed: Packed, shape: torch.Size, dtype: torch.dtype, fingerprint: Any = None
    ) -> "PackedWeight":
        """Wrap a packed weight."""
        device = next(iter(packed.parts.values())).device
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self.storage_name, self.fingerprint, self._layout = storage, fingerprint, packed.layout
        self._part_names = [f"{_PART}{name}" for name in packed.parts]
        for name, part in packed.parts.items():
            setattr(self, f"{_PART}{name}", part)
        return self

    @classmethod
    def pack(cls, weight: Tensor, storage: str, fingerprint: Any = None) -> "PackedWeight":
        """Pack a dense weight (out, in)."""
        return cls(storage, STORAGES[storage].pack(weight), weight.shape, weight.dtype, fingerprint)

    @property
    def packed(self) -> Packed:
        """What is stored."""
        return Packed(
            {name.removeprefix(_PART): getattr(self, name) for name in self._part_names}, self._layout
        )

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new dense tensor (out, in), in ``dtype`` or this weight's own."""
        return STORAGES[self.storage_name].unpack(self.packed, self.shape, dtype or self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({self.storage_name}, {tuple(self.shape)}, {self.dtype}, device={self.device})"

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "PackedWeight":
        parts = {name: change(part) for name, part in self.packed.parts.items()}
        return PackedWeight(
            self.storage_name, Packed(parts, self._layout), self.shape, dtype or self.dtype, self.fingerprint
        )

    # --- PyTorch's protocols for tensor classes ---

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return self._part_names, (self.storage_name, self._layout, self.dtype, self.fingerprint)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Self:
        storage, layout, dtype, fingerprint = context
        packed = Packed({name.removeprefix(_PART): part for name, part in parts.items()}, layout)
        return cls(storage, packed, torch.Size(size), dtype, fingerprint)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            arguments = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if isinstance(arguments["weight"], PackedWeight) and not isinstance(
                arguments["input"], PackedWeight
            ):
                return packed_linear(arguments["input"], arguments["weight"], arguments.get("bias"))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's own one is no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if func in _SAME_VALUES:
                return first._with(lambda part: func(part))
            if func is aten._to_copy.default and kwargs.get("dtype", first.dtype).is_floating_point:
                device = kwargs.get("device") or first.device
                return first._with(lambda part: part.to(device), kwargs.get("dtype"))
            if func._schema.is_mutable and func._schema.arguments[0].is_write:
                raise RuntimeError(
                    f"{func} would write to a weight that is stored as {first.storage_name}; accepted: "
                    "replacing the parameter, or model.backbone.quantization: none"
                )
        return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def dense(value: Any) -> Any:
    """Return a dense copy of a packed weight; anything else as it is."""
    return value.dense() if isinstance(value, PackedWeight) else value


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor is stored as: itself, or the parts of a tensor class."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored_tensors(getattr(tensor, name))
    else:
        yield tensor


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes in which a tensor is stored."""
    return sum(part.numel() * part.element_size() for part in stored_tensors(tensor))


class _PackedLinear(torch.autograd.Function):
    """``W0 x + b``; saves the packed W0 only, and unpacks it again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.x_dtype = dtype, x.dtype
        return _linear(x, weight, bias, dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        dx = torch.matmul(dy, weight.dense(ctx.dtype)).to(ctx.x_dtype) if needs_x else None
        return dx, None, dy.flatten(0, -2).sum(0) if needs_bias else None, None


def _linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with autocast_disabled(x):
        return F.linear(x.to(dtype), weight.dense(dtype), None if bias is None else bias.to(dtype))


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Compute ``W0 x + b`` with a packed weight, which gets no gradient.

    Args:
        x: Input, (..., in).
        weight: W0, (out, in).
        bias: b, (out,).

    Returns:
        The output, (..., out), in the dtype that ``F.linear`` of the dense weight has.
    """
    dtype = matmul_dtype(x, weight)
    if dtype == weight.dtype != x.dtype:  # as for a dense weight
        raise RuntimeError(f"expected an input of {weight.dtype}, but got {x.dtype}")
    if not torch.is_grad_enabled() or transforms_are_active():
        return _linear(x, weight, bias, dtype)
    # Detached because models may write to the output in place, which a view would not allow.
    return cast(Tensor, _PackedLinear.apply(x, weight, bias, dtype))  # type: ignore[no-untyped-call]
