"""8-bit integers with a scale for each output, which need no package."""

from typing import Any

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.storages.base import Packed, Storage

_CHUNKS = 8
"""A 16-bit weight is computed in this many pieces, so that its float32 form is never whole."""


class Int8(Storage):
    """``W = s ⊙ Q`` with integers Q from -127 to 127 and a float32 scale s for each output.

    The format of LLM.int8() in bitsandbytes (Dettmers et al. 2022, arXiv 2208.07339). Inputs are not
    quantized, unlike there.
    """

    name = "int8"

    def pack(self, weight: Tensor) -> Packed:
        """Pack a weight (out, in)."""
        dense = weight.detach().float()
        scales = dense.abs().amax(1) / 127  # (out,)
        divisor = torch.where(scales == 0, 1.0, scales).unsqueeze(1)
        return Packed({"codes": (dense / divisor).round_().to(torch.int8), "scales": scales})

    def unpack(self, packed: Packed, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the dense weight (out, in)."""
        codes, scales = packed.parts["codes"], packed.parts["scales"].unsqueeze(1)
        if dtype.itemsize >= 4:
            return codes.float().mul_(scales).to(dtype)
        dense = torch.empty(shape, dtype=dtype, device=codes.device)
        rows = -(-shape[0] // _CHUNKS)
        for piece, code, scale in zip(dense.split(rows), codes.split(rows), scales.split(rows), strict=True):
            piece.copy_(code.float().mul_(scale))
        return dense

    def read_layer(self, linear: nn.Linear) -> Packed | None:
        """Return the packed weight of a ``Linear8bitLt`` of bitsandbytes."""
        weight: Any = linear._parameters.get("weight")
        if type(linear).__name__ != "Linear8bitLt" or weight.dtype != torch.int8:
            return None
        state: Any = linear.state
        scales: Tensor = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        return Packed({"codes": weight.data, "scales": scales.float() / 127})
