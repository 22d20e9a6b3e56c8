"""NF4 of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by the package bitsandbytes."""

from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.storages.base import Packed, Storage

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Layout(NamedTuple):
    kind: str
    block: int
    outer_block: int | None  # of the scales of the scales


def _functional() -> Any:
    from bitsandbytes import functional

    return functional


class NF4(Storage):
    """4-bit codes of normally distributed weights, with a float32 scale for each 64: 4.5 bits per weight."""

    name = "nf4"
    package = "bitsandbytes"
    double: ClassVar[bool] = False
    """Whether the scales are quantized too."""

    def pack(self, weight: Tensor) -> Packed:
        """Pack a weight (out, in)."""
        if weight.is_meta:
            return self._on_meta(weight.numel())
        functional = _functional()

        dense = weight.detach()
        if dense.dtype not in _DTYPES:
            dense = dense.float()
        codes, state = functional.quantize_4bit(
            dense.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=self.double
        )
        return _from_state(codes, state)

    def unpack(self, packed: Packed, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return the dense weight (out, in)."""
        functional = _functional()

        parts, layout = packed.parts, cast(_Layout, packed.layout)
        codes = parts["codes"]
        if codes.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        absmax = parts["scales"]
        if layout.outer_block is not None:
            outer = functional.QuantState(
                absmax=parts["outer_scales"],
                code=parts["outer_code"],
                blocksize=layout.outer_block,
                dtype=torch.float32,
            )
            absmax = functional.dequantize_blockwise(absmax, quant_state=outer) + parts["offset"]
        state = functional.QuantState(
            absmax=absmax,
            # One row: the CPU kernel of bitsandbytes 0.50 is wrong for rows that end inside a block.
            shape=torch.Size([shape.numel()]),
            blocksize=layout.block,
            quant_type=layout.kind,
            dtype=dtype if dtype in _DTYPES else torch.float32,
        )
        dense: Tensor = functional.dequantize_4bit(codes, quant_state=state)
        return dense.view(shape).to(dtype)

    def _on_meta(self, elements: int) -> Packed:
        """Return parts without values; the package would keep a table on the meta device for later calls."""
        blocks = -(-elements // 64)
        empty = partial(torch.empty, device="meta")
        parts = {"codes": empty(-(-elements // 2), 1, dtype=torch.uint8), "scales": empty(blocks)}
        if self.double:
            parts["scales"] = empty(blocks, dtype=torch.uint8)
            parts |= {"outer_scales": empty(-(-blocks // 256)), "outer_code": empty(256), "offset": empty(())}
        return Packed(parts, _Layout("nf4", 64, 256 if self.double else None))

    def read_layer(self, linear: nn.Linear) -> Packed | None:
        """Return the packed weight of a ``Linear4bit`` of bitsandbytes."""
        weight: Any = linear._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if type(linear).__name__ != "Linear4bit" or state is None:
            return None
        if (state.quant_type, state.nested) != ("nf4", self.double):
            return None
        return _from_state(weight.data, state)


class NF4Double(NF4):
    """NF4 with scales in 8 bits: 4.13 bits per weight."""

    name = "nf4_double"
    double = True


def _from_state(codes: Tensor, state: Any) -> Packed:
    parts = {"codes": codes.detach().view(torch.uint8), "scales": state.absmax}
    if state.nested:
        outer = state.state2
        parts |= {"outer_scales": outer.absmax, "outer_code": outer.code, "offset": state.offset}
    return Packed(
        parts, _Layout(state.quant_type, state.blocksize, state.state2.blocksize if state.nested else None)
    )
