"""Keeping less for backward: what elementwise operations made of kept tensors is computed again when backward asks for it.

Of a gated MLP, ``down(act(gate) * up)``, autograd keeps four tensors of its width, and gate and up are enough; the output of
an RMS norm follows from its input, and a wider copy of a tensor from a narrow one. All of it is read off the graph that
autograd builds, not off the model's modules: whatever a model's code does, the same operation has the same numbers, and so
makes the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node

RECOMPUTED = {"MulBackward0", "SiluBackward0", "GeluBackward0", "ToCopyBackward0"}
"""Names of autograd's nodes: a product, two activations, a change of dtype."""

LONGEST = 4
"""Operations at most that one tensor takes: a gated MLP has two, a norm four. Of a loop's long chain, every fifth is kept."""


@contextmanager
def elementwise_recomputed() -> Iterator[None]:
    """In the ``with`` block, let autograd keep no output of a cheap elementwise operation; numbers are the same bit for bit.

    Changes nothing where no graph is built, inside a checkpointed layer, which keeps nothing, while torch.compile traces, and
    where somebody else's hooks are at work already (``save_on_cpu``). A graph must be gone through whole: after a backward that
    freed an operation, another that needs its output raises RuntimeError, where autograd might have kept that output.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or hooked:
        yield
        return
    keeping = _Keeping()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keeping.pack, lambda kept: kept()):
            yield
    finally:
        keeping.forget()


class _Keeping:
    """What stands in one forward's graph for every tensor that is saved for backward: something that returns it."""

    def __init__(self) -> None:
        self._found: dict[Node, _Again | None] = {}
        self._narrow: dict[Node, _Kept] = {}
        # By its number, what a node has saved through this hook, told by what made that. Inside a checkpoint nodes save
        # elsewhere, and what they saved there can be asked for once only.
        self._saved: dict[int, set[Node | None]] = {}

    def pack(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Autograd's hook."""
        number = torch.autograd._get_sequence_nr() - 1  # of the node that has just been made, and saves
        self._saved.setdefault(number, set()).add(tensor.grad_fn)
        whole = tensor if tensor._base is None else tensor._base
        node = whole.grad_fn
        if node is None or whole._version > 0:  # once written to, it may not be what its node made
            return _Kept(tensor)
        again = self._again(node)
        if again is not None:
            again.is_used(whole.stride())
            return again if whole is tensor else _View(again, tensor)
        if whole is tensor and (dtype := _narrower(node, tensor)) is not None:
            if node not in self._narrow:
                self._narrow[node] = _Kept(tensor.detach().to(dtype))
            return _Wide(self._narrow[node], tensor.dtype)
        return _Kept(tensor)

    def forget(self) -> None:
        """After forward: the graph holds its hooks, which would hold the graph."""
        self._found.clear()
        self._narrow.clear()
        self._saved.clear()

    def _again(self, node: Node, depth: int = 1) -> "_Again | None":
        """How a node's output is computed again; None where an input is missing or it takes too many operations."""
        if node not in self._found:
            self._found[node] = (
                self._search(node, depth) if node.name() in RECOMPUTED and depth <= LONGEST else None
            )
        return self._found[node]

    def _search(self, node: Node, depth: int) -> "_Again | None":
        sources = [source for source, _ in node.next_functions if source is not None]
        saves_nothing = node.name() == "ToCopyBackward0"
        saved = self._saved.get(node._sequence_nr())
        if not saves_nothing and (saved is None or not saved <= {*sources, None}):
            return None
        # A product keeps a factor for the other one's gradient, and does not if that is a frozen weight or a number.
        if saves_nothing or (node.name() == "MulBackward0" and len(sources) == 1):
            missing = self._again(sources[0], depth + 1)
            again = None if missing is None else _Again(node, [missing], missing)
        else:
            again = _Again(
                node, [found for source in sources if (found := self._found.get(source)) is not None]
            )
        return again if again is not None and again.operations <= LONGEST else None


class _Again:
    """A node's output, computed from what the node has kept; once for all that ask for it in a backward."""

    def __init__(self, node: Node, inputs: list["_Again"], missing: "_Again | None" = None) -> None:
        self.operations: int = 1 + sum(each.operations for each in inputs)
        self._node: Any = node  # of the graph's own, further back: holding it is no cycle, and no tensor more
        self._inputs = inputs
        self._missing = missing
        self._uses = self._asked = 0
        self._stride: tuple[int, ...] | None = None
        self._value: Tensor | None = None

    def is_used(self, stride: tuple[int, ...] | None = None) -> None:
        """By one more operation, which will ask for it in backward; ``stride`` is how the output lay."""
        self._stride = self._stride or stride
        if not self._uses:
            for each in self._inputs:
                each.is_used()
        self._uses += 1

    @torch.no_grad()
    def __call__(self) -> Tensor:
        value = self._laid_out(self._output()) if self._value is None else self._value
        self._asked += 1
        self._value = value if self._asked % self._uses else None
        return value

    def _laid_out(self, value: Tensor) -> Tensor:
        """As the output lay, which an operation may have been told (``memory_format``): views of it count on that."""
        if self._stride is None or value.stride() == self._stride:
            return value
        return torch.empty_strided(value.shape, self._stride, dtype=value.dtype, device=value.device).copy_(
            value
        )

    def _output(self) -> Tensor:
        node = self._node
        match node.name():
            case "SiluBackward0":
                return F.silu(node._saved_self)
            case "GeluBackward0":
                return F.gelu(node._saved_self, approximate=node._saved_approximate)
            case "ToCopyBackward0":
                of = node._input_metadata[0]
                return self._absent().to(of.device, of.dtype)
        one, other = node._saved_self, node._saved_other
        return (self._absent() if one is None else one) * (self._absent() if other is None else other)

    def _absent(self) -> Tensor:
        """The one input that the node has not kept."""
        assert self._missing is not None
        return self._missing()


class _Kept:
    """A tensor as it is, which may not be written to before backward: under hooks, autograd does not look after that."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()  # the graph of an operation's own output would hold itself
        self._version = tensor._version

    def __call__(self) -> Tensor:
        if self._tensor._version != self._version:
            shape = tuple(self._tensor.shape)
            raise RuntimeError(
                f"a tensor {shape} needed for gradient computation has been modified by an inplace operation"
            )
        return self._tensor


class _View:
    """A view of a tensor that is computed again."""

    def __init__(self, whole: _Again, view: Tensor) -> None:
        self._whole = whole
        self._layout = view.size(), view.stride(), view.storage_offset()

    def __call__(self) -> Tensor:
        return self._whole().as_strided(*self._layout)


class _Wide:
    """A wide copy of a kept narrow tensor."""

    def __init__(self, narrow: _Kept, dtype: torch.dtype) -> None:
        self._narrow = narrow
        self._dtype = dtype

    def __call__(self) -> Tensor:
        return self._narrow().to(self._dtype)


def _narrower(node: Node, copy: Tensor) -> torch.dtype | None:
    """The narrower floating dtype that a node widened to make ``copy`` of, if it did: every number is there in it exactly."""
    if node.name() != "ToCopyBackward0":
        return None
    source, number = node.next_functions[0]
    of: Any = source
    metadata = of._input_metadata[number]
    narrower = metadata.dtype.is_floating_point and metadata.dtype.itemsize < copy.dtype.itemsize
    return metadata.dtype if narrower and metadata.device == copy.device else None
