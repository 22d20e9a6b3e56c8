"""Count the bytes of live tensors while code runs, on any device; the meta device included."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gatera_lightning.adapters.packed_weight import PackedWeight, stored_tensors


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create, for as long as something refers to them.

    Attributes:
        now: Bytes that are alive.
        peak: The most bytes that were alive at once.
        recent_peak: The same since :meth:`reset_recent_peak`.
    """

    def __init__(self, known: list[Tensor]) -> None:
        """Start at 0.

        Args:
            known: Tensors whose storages are not counted, such as a model's parameters and buffers.
        """
        super().__init__()
        self.now = self.peak = self.recent_peak = 0
        # By address: a storage on the meta device has no data pointer, and several Python objects.
        self._sizes: dict[int, int] = {
            part.untyped_storage()._cdata: 0 for tensor in known for part in stored_tensors(tensor)
        }
        self._known = known

    def reset_recent_peak(self) -> None:
        """Let ``recent_peak`` start from what is alive now."""
        self.recent_peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, PackedWeight) for kind in types):
            return NotImplemented  # it unpacks itself, by operations that come back here
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, PackedWeight):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak, self.recent_peak = max(self.peak, self.now), max(self.recent_peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
