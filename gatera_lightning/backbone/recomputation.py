"""Recompute cheap elementwise outputs in the backward pass instead of saving them.

Autograd saves four wide tensors of a gated MLP, ``down(act(gate) * up)``, although gate and up are enough; it
saves the output of an RMS norm, which follows from the norm's input; and it saves the fp32 copy of a bf16
tensor. What can be recomputed is read from the graph that autograd builds, not from the model's modules. So
it works for any model's code, and because the same operation runs on the same numbers, gradients are
bit-identical.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

RECOMPUTED_NODES = {"MulBackward0", "SiluBackward0", "GeluBackward0", "ToCopyBackward0"}
"""Names of the autograd nodes whose output is recomputed: products, two activations, casts."""

MAX_OPERATIONS = 4
"""The most operations that recomputing one tensor may take. A gated MLP needs two, a norm four. In a longer
chain, such as a loop's, every fifth output is saved."""


@contextmanager
def recompute_elementwise() -> Iterator[None]:
    """Inside the block, autograd saves no outputs of cheap elementwise operations; results are bit-identical.

    The block does nothing where no graph is built, inside a layer with gradient checkpointing (which saves
    nothing), while torch.compile traces, and where other saved-tensor hooks are active (such as
    ``save_on_cpu``).

    The backward pass must go through the whole graph at once: if one backward pass has freed an operation, a
    later one that needs its output raises RuntimeError, where autograd on its own might have saved that
    output.
    """
    other_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or other_hooks:
        yield
        return
    hooks = _SavedTensorHooks()
    try:
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, lambda packed: packed()):
            yield
    finally:
        hooks.clear()


class _SavedTensorHooks:
    """Replaces each tensor that one forward pass saves by something that returns it when called."""

    def __init__(self) -> None:
        self._found: dict[Node, _Recomputed | None] = {}
        self._narrow: dict[Node, _Saved] = {}

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Autograd's hook."""
        base = tensor if tensor._base is None else tensor._base
        node = base.grad_fn
        if node is None or base._version > 0:  # after an in-place write it may not be the node's output
            return _Saved(tensor)
        recomputed = self._recomputed(node)
        if recomputed is not None:
            recomputed.add_use(base.stride())
            return recomputed if base is tensor else _RecomputedView(recomputed, tensor)
        if base is tensor and (dtype := _narrower_dtype(node, tensor)) is not None:
            if node not in self._narrow:
                self._narrow[node] = _Saved(tensor.detach().to(dtype))
            return _Widened(self._narrow[node], tensor.dtype)
        return _Saved(tensor)

    def clear(self) -> None:
        """Drop the references to the graph after the forward pass; the graph refers to its hooks."""
        self._found.clear()
        self._narrow.clear()

    def _recomputed(self, node: Node, depth: int = 1) -> "_Recomputed | None":
        """Return how to recompute a node's output; None if an input is missing or it takes too long."""
        if node not in self._found:
            candidate = node.name() in RECOMPUTED_NODES and depth <= MAX_OPERATIONS
            self._found[node] = self._search(node, depth) if candidate else None
        return self._found[node]

    def _search(self, node: Node, depth: int) -> "_Recomputed | None":
        sources = [source for source, _ in node.next_functions if source is not None]
        saves_nothing = node.name() == "ToCopyBackward0"
        if not saves_nothing and not _saved_by_these_hooks(node):
            return None
        # A product saves a factor for the gradient of the other one, and does not if that is a frozen weight
        # or a number.
        if saves_nothing or (node.name() == "MulBackward0" and len(sources) == 1):
            missing = self._recomputed(sources[0], depth + 1)
            recomputed = None if missing is None else _Recomputed(node, [missing], missing)
        else:
            inputs = [found for source in sources if (found := self._found.get(source)) is not None]
            recomputed = _Recomputed(node, inputs)
        return recomputed if recomputed is not None and recomputed.operations <= MAX_OPERATIONS else None


def _saved_by_these_hooks(node: Any) -> bool:
    """Return whether everything that a node saved went through hooks of this module.

    Nodes inside a checkpointed layer save elsewhere, and what they saved can be unpacked only once.
    """
    raw = (getattr(node, name, None) for name in ("_raw_saved_self", "_raw_saved_other"))
    saved = [each.data for each in raw if each is not None]  # None for a factor that was not needed
    through_hooks = [data for data in saved if data is not None and not _is_number(data)]
    return bool(through_hooks) and all(isinstance(data, _PACKED) for data in through_hooks)


def _is_number(data: Any) -> bool:
    """Return whether a node saved a Python number, which no hook sees."""
    return isinstance(data, Tensor) and data.ndim == 0


class _Recomputed:
    """A node's output, computed from what the node saved, once per backward pass for all its uses."""

    def __init__(
        self, node: Node, inputs: list["_Recomputed"], missing_input: "_Recomputed | None" = None
    ) -> None:
        self.operations: int = 1 + sum(each.operations for each in inputs)
        self._node: Any = node  # earlier in the same graph: this makes no cycle and keeps nothing alive
        self._inputs = inputs
        self._missing_input = missing_input
        self._uses = self._calls = 0
        self._stride: tuple[int, ...] | None = None
        self._value: Tensor | None = None

    def add_use(self, stride: tuple[int, ...] | None = None) -> None:
        """Count one more use of the output; ``stride`` is that of the original output."""
        self._stride = self._stride or stride
        if not self._uses:
            for each in self._inputs:
                each.add_use()
        self._uses += 1

    @torch.no_grad()
    def __call__(self) -> Tensor:
        value = self._with_original_stride(self._output()) if self._value is None else self._value
        self._calls += 1
        self._value = value if self._calls % self._uses else None
        return value

    def _with_original_stride(self, value: Tensor) -> Tensor:
        """Copy to the memory layout of the original output, which views rely on."""
        if self._stride is None or value.stride() == self._stride:
            return value
        laid_out = torch.empty_strided(value.shape, self._stride, dtype=value.dtype, device=value.device)
        return laid_out.copy_(value)

    def _output(self) -> Tensor:
        node = self._node
        match node.name():
            case "SiluBackward0":
                return F.silu(node._saved_self)
            case "GeluBackward0":
                return F.gelu(node._saved_self, approximate=node._saved_approximate)
            case "ToCopyBackward0":
                target = node._input_metadata[0]
                return self._missing().to(target.device, target.dtype)
        left, right = node._saved_self, node._saved_other
        return (self._missing() if left is None else left) * (self._missing() if right is None else right)

    def _missing(self) -> Tensor:
        """Recompute the one input that the node did not save."""
        assert self._missing_input is not None
        return self._missing_input()


class _Saved:
    """A saved tensor that must not be written to; autograd does not check that for tensors saved by hooks."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # an operation's own output would keep its graph alive in a cycle
        self._version = tensor._version

    def __call__(self) -> Tensor:
        if self._tensor._version != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(
                f"a tensor {shape} needed for gradient computation has been modified by an inplace operation"
            )
        return self._tensor


class _RecomputedView:
    """A view of a recomputed tensor."""

    def __init__(self, base: _Recomputed, view: Tensor) -> None:
        self._base = base
        self._layout = view.size(), view.stride(), view.storage_offset()

    def __call__(self) -> Tensor:
        return self._base().as_strided(*self._layout)


class _Widened:
    """A cast to a wider dtype of a saved narrow tensor."""

    def __init__(self, narrow: _Saved, dtype: torch.dtype) -> None:
        self._narrow = narrow
        self._dtype = dtype

    def __call__(self) -> Tensor:
        return self._narrow().to(self._dtype)


_PACKED = (_Recomputed, _Saved, _RecomputedView, _Widened)
"""What :class:`_SavedTensorHooks` packs tensors into."""


def _narrower_dtype(node: Node, copy: Tensor) -> torch.dtype | None:
    """Return the dtype of the input if a node cast it to the wider dtype of ``copy``, else None."""
    if node.name() != "ToCopyBackward0":
        return None
    source, number = node.next_functions[0]
    source_node: Any = source
    metadata = source_node._input_metadata[number]
    is_narrower = metadata.dtype.is_floating_point and metadata.dtype.itemsize < copy.dtype.itemsize
    return metadata.dtype if is_narrower and metadata.device == copy.device else None
