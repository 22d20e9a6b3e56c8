"""An adapted layer: a frozen linear layer, an update and a gate, composed."""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import weight_fingerprint
from gatera_lightning.adapters.gates import GATES, Gate
from gatera_lightning.adapters.kernels.hadamard import merged_hadamard
from gatera_lightning.adapters.kernels.saturated_gates import partitioned_hadamard
from gatera_lightning.adapters.updates.dora import DoRA
from gatera_lightning.adapters.updates.hira import HiRA
from gatera_lightning.adapters.updates.lora import LoRA

Update = LoRA | DoRA | HiRA
UPDATES: dict[str, type[LoRA] | type[DoRA] | type[HiRA]] = {"lora": LoRA, "dora": DoRA, "hira": HiRA}


class AdaptedLinear(nn.Module):
    """``y = W0 x + b + g(x) · u(x)`` with ``W0`` and ``b`` frozen.

    ``update(y, x, base_out, weight, g)`` returns ``y + g · u(x)``: each update knows where the gate's product is cheapest.
    ``base_out`` is ``W0 x`` for an update that ``reads_base_out``; others must not look at it.
    ``gate`` is None for the ungated method. ``on_gate`` is called with the gate's logits in every forward while
    :func:`~gatera_lightning.adapters.gate_recording.record_gates` listens.
    """

    def __init__(
        self, base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        dtype = getattr(torch, config.adapter_dtype)
        self.config = config
        self.base = base.requires_grad_(False)
        self.base_fingerprint = weight_fingerprint(base.weight)
        self.update: Update = UPDATES[config.update](
            base, rank=config.rank, scale=config.scale, dtype=dtype, generator=generator
        )
        gate_class = GATES[config.gate]
        self.gate: Gate | None = None
        if gate_class is not None:
            self.gate = gate_class(
                base.in_features, bias=config.gate_bias, dtype=dtype, device=base.weight.device
            )
        self.dropout = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()
        self.on_gate: Callable[[Tensor], None] | None = None
        self.routed: Callable[[Tensor, Tensor | None], Tensor] | None = None
        """What computes the output from x, and z if somebody listens, inside of a fast ``prepared_for_inference``."""

    def adapter_params(self) -> dict[str, nn.Parameter]:
        """The parameters that belong to the adapter, by their names within this layer: everything but the base."""
        own = {f"update.{name}": p for name, p in self.update.named_parameters()}
        if self.gate is not None:
            own |= {f"gate.{name}": p for name, p in self.gate.named_parameters()}
        return own

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)."""
        if x.ndim == 1:
            return cast(Tensor, self(x.unsqueeze(0))).squeeze(0)
        if (
            self.routed is not None and self.on_gate is None
        ):  # first: decoding a token, Python between products shows
            return self.routed(x, None)
        z = g = None
        if self.gate is not None:
            z = self.gate(x)  # (...)
            if self.on_gate is not None:
                self.on_gate(z)
        if self.routed is not None:
            return self.routed(x, z)
        if z is not None:
            g = torch.sigmoid(z)
        if (
            isinstance(self.update, HiRA)
            and self.update.kept is None
            and self.training
            and torch.is_grad_enabled()
        ):
            frozen = x, self.base.weight, self.base.bias
            if self.config.tells_tokens_apart and g is not None and not x.is_meta:
                thresholds = self.config.skip_below, self.config.merge_above
                return partitioned_hadamard(*frozen, self.update.a, self.update.b, g, *thresholds)
            if g is None and self._forgives_merging(x):
                return merged_hadamard(*frozen, self.update.a, self.update.b)
        if self.update.reads_base_out and self.base.bias is not None:
            base_out = F.linear(x, self.base.weight)  # (..., out): DoRA rescales this part, not the bias
            y = base_out + self.base.bias
        else:
            y = base_out = self.base(x)  # as the frozen model rounds it
        return cast(Tensor, self.update(y, self.dropout(x), base_out, self.base.weight, g))

    def _forgives_merging(self, x: Tensor) -> bool:
        """Whether ``W0 + W0 ⊙ BA`` may stand for its parts: no dropout between them, and not in bf16, which rounds it to W0."""
        autocast = torch.is_autocast_enabled("cpu" if x.is_meta else x.device.type)
        return isinstance(self.dropout, nn.Identity) and self.base.weight.dtype.itemsize >= 4 and not autocast

    # Model code asks a linear layer for these (dtype probes, tied heads); the answer is the frozen layer's.
    @property
    def weight(self) -> Tensor:
        """The frozen weight (out, in)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (out,), if any."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    def extra_repr(self) -> str:
        """The method in ``print(model)``."""
        return f"update={self.config.update}, gate={self.config.gate}, rank={self.config.rank}"
