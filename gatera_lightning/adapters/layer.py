"""An adapted layer: a frozen linear layer, an update and a gate."""

from collections.abc import Callable
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import WeightFingerprint, weight_fingerprint
from gatera_lightning.adapters.gates import Gate
from gatera_lightning.adapters.linear_layers import has_plain_forward
from gatera_lightning.adapters.updates import UPDATES
from gatera_lightning.adapters.updates.base import Update, add_gated

GateListener = Callable[[Tensor], None]
"""Receives the gate's logits (...) of a forward pass."""

InferencePath = Callable[[Tensor, GateListener | None], Tensor]
"""Computes a layer's output (..., out) from its input (..., in); passes the gate's logits to the listener."""


class LayerParts(NamedTuple):
    """What an adapter adds to one frozen layer."""

    update: Update
    """The update ``u``."""

    gate: Gate | None
    """The gate; None for ``g = 1``."""

    dropout: nn.Module
    """Dropout on the update's input."""


def build_parts(
    base: nn.Linear, config: AdapterConfig, generator: torch.Generator | None = None, *, name: str = ""
) -> LayerParts:
    """Create the update, the gate and the dropout of one layer.

    Args:
        base: The frozen layer.
        config: The adapter's settings.
        generator: CPU generator that draws the update's initial values.
        name: Name of the layer in the model, which its rank and alpha may depend on.
    """
    dtype = getattr(torch, config.adapter_dtype)
    update = UPDATES[config.update](
        base,
        rank=config.rank_of(name),
        scale=config.scale_of(name),
        dtype=dtype,
        generator=generator,
        **config.extra_settings,
        **config.training_settings,
    )
    gate = config.gate.build_for(base, dtype)
    return LayerParts(update, gate, nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity())


def add_to_selected(
    y: Tensor, x: Tensor, selected: Tensor, update: Update, base: nn.Linear, dropout: nn.Module
) -> Tensor:
    """Return y with ``u(x)`` added to some tokens; the others are as they were, bit for bit.

    Args:
        y: Output without the update, (..., out).
        x: Input, (..., in).
        selected: Indices into the flattened tokens, (n,).
        update: The update.
        base: The frozen layer.
        dropout: Dropout on the update's input.
    """
    if not len(selected) and not torch.is_grad_enabled():
        return y
    rows = x.flatten(0, -2).index_select(0, selected)  # (n, in)
    u = update.delta_with_dropout(rows, base, dropout).to(y.dtype)  # (n, out)
    return y.flatten(0, -2).index_add(0, selected, u).view(y.shape)


class AdaptedLinear(nn.Module):
    """Computes ``y = W0 x + b + g(x) · u(x)`` with ``W0`` and ``b`` frozen.

    Args:
        base: The layer to adapt; its parameters are frozen. It may be an adapted layer that is frozen itself.
        config: The adapter's settings.
        generator: CPU generator that draws the update's initial values.
        name: Name of the layer in the model, which its rank and alpha may depend on.

    Attributes:
        base: The frozen layer.
        update: The update ``u``.
        gate: The gate; None for ``g = 1``.
    """

    _frozen_digest: str | None = None

    def __init__(
        self,
        base: nn.Linear,
        config: AdapterConfig,
        generator: torch.Generator | None = None,
        *,
        name: str = "",
    ) -> None:
        super().__init__()
        self.config = config
        self.base = base.requires_grad_(False)
        parts = build_parts(base, config, generator, name=name)
        self.update: Update = parts.update
        self.gate: Gate | None = parts.gate
        self.dropout: nn.Module = parts.dropout
        self._base_fingerprint = weight_fingerprint(base.weight)
        self._gate_listener: GateListener | None = None
        self._inference_path: InferencePath | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the adapted layer's output: (..., in) -> (..., out)."""
        if x.ndim == 1:
            return cast(Tensor, self(x.unsqueeze(0))).squeeze(0)
        # First, because Python's overhead shows when decoding one token. A hook may have been added since.
        if self._inference_path is not None and has_plain_forward(self.base):
            return self._inference_path(x, self._gate_listener)
        gate = self.gate
        if gate is None:
            return cast(Tensor, self.update(x, self.base, None, self.dropout))
        if gate.selects_tokens:
            return self._forward_selected(x, gate)
        if gate.needs_update:
            return self._forward_update_first(x, gate)
        logit = gate(x)  # (...)
        if self._gate_listener is not None:
            self._gate_listener(logit)
        return cast(Tensor, self.update(x, self.base, gate.values(logit), self.dropout))

    def _forward_update_first(self, x: Tensor, gate: Gate) -> Tensor:
        """Compute the output with a gate that reads the update's output."""
        y = self.base(x)
        is_matmul = self.base.bias is None and has_plain_forward(self.base)
        base_out = y if is_matmul else F.linear(x, self.base.weight)  # (..., out)
        update_out = self.update.delta_with_dropout(x, self.base, self.dropout)  # (..., out)
        logit = gate(x, base_out, update_out)  # (...)
        if self._gate_listener is not None:
            self._gate_listener(logit)
        return add_gated(y, update_out, gate.values(logit))

    def _forward_selected(self, x: Tensor, gate: Gate) -> Tensor:
        """Compute the output with a gate that selects tokens; for others it is that of the frozen layer.

        ``W0 x`` is one matmul for all tokens, of the same shape as without an adapter: a matmul of another
        shape may round differently.
        """
        selected = gate.selected_tokens(x)  # (n,)
        if self._gate_listener is not None:
            self._gate_listener(gate(x))
        return add_to_selected(self.base(x), x, selected, self.update, self.base, self.dropout)

    @property
    def is_active(self) -> bool:
        """Whether the layer applies an adapter; a layer of PEFT can have several, or none that is active."""
        return True

    @property
    def frozen_digest(self) -> str | None:
        """Digest of the adapter that :meth:`freeze` has made a part of the frozen model; else None."""
        return self._frozen_digest

    def freeze(self, digest: str) -> None:
        """Make the adapter a part of the frozen model, which computes what it does in decoding.

        Args:
            digest: Identifies the adapter that this layer belongs to.
        """
        self._frozen_digest = digest
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen adapter stays in evaluation mode, without dropout and draws of gates."""
        return super().train(mode and self._frozen_digest is None)

    def adapter_params(self) -> dict[str, nn.Parameter]:
        """Return the adapter's parameters by their names in this layer: all but the base's."""
        own = {f"update.{name}": p for name, p in self.update.named_parameters()}
        if self.gate is not None:
            own |= {f"gate.{name}": p for name, p in self.gate.named_parameters()}
        return own

    @property
    def gate_listener(self) -> GateListener | None:
        """What receives the gate's logits of every forward pass, if anything."""
        return self._gate_listener

    def set_gate_listener(self, listener: GateListener | None) -> None:
        """Call ``listener`` with the gate's logits in every forward pass; None stops it."""
        self._gate_listener = listener

    @property
    def inference_path(self) -> InferencePath | None:
        """What computes the output in place of the update and the gate, if anything."""
        return self._inference_path

    def set_inference_path(self, path: InferencePath | None) -> None:
        """Let ``path`` compute the output; None returns to the update and the gate."""
        self._inference_path = path

    @property
    def base_fingerprint(self) -> WeightFingerprint:
        """The fingerprint of the frozen weight; empty if it had no memory when the layer was built."""
        return self._base_fingerprint

    def set_base_fingerprint(self, fingerprint: WeightFingerprint) -> None:
        """Set the fingerprint of a frozen weight that is loaded or sharded after the layer was built."""
        self._base_fingerprint = fingerprint

    # Model code reads these from a linear layer (dtype checks, tied heads): return the frozen layer's.
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
        """Size of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.base.out_features

    def extra_repr(self) -> str:
        """Return the method, for ``print(model)``."""
        return f"update={self.config.update}, gate={self.config.gate.kind}, rank={len(self.update.a)}"
