"""Record the gate logits of a forward pass: for the entropy term, statistics and plots."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.errors import checks_arguments


@dataclass
class GateRecord:
    """Gate logits in the order in which the layers ran."""

    names: list[str] = field(default_factory=list)
    """Names of the adapted layers."""

    logits: list[Tensor] = field(default_factory=list)
    """The logits of each, (batch, tokens) or as the model flattened them."""

    def add(self, name: str, logit: Tensor) -> None:
        """Append a copy of the logits of the layer ``name``.

        A gate may return a view of its parameter, as the static gate does. FSDP2 frees a layer's parameters
        when the layer has run, and the view would point to freed memory.
        """
        self.names.append(name)
        self.logits.append(logit.clone())

    def clear(self) -> None:
        """Remove all names and logits, before the next forward pass is recorded."""
        self.names.clear()
        self.logits.clear()

    def stacked(self, mask: Tensor) -> Tensor | None:
        """Return all logits as one tensor.

        Args:
            mask: Mask of the batch, (batch, tokens). It gives the shape, because some models flatten the
                tokens before a linear layer.

        Returns:
            The logits, (layers, batch, tokens); None if no layer has a gate.

        Raises:
            ValueError: If a layer saw another number of tokens than the batch has, as in a mixture of
                experts.
        """
        if not self.logits:
            return None
        for name, logit in zip(self.names, self.logits, strict=True):
            if logit.numel() != mask.numel():
                raise ValueError(
                    f"the gate of {name} saw {logit.numel()} tokens of a batch of {tuple(mask.shape)}, so "
                    "it is unknown which of them are padding. Use gate 'none', or remove this layer from "
                    "adapter.target_modules."
                )
        return torch.stack([logit.reshape(mask.shape) for logit in self.logits])


@checks_arguments
@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecord]:
    """Record the gate logits of every forward pass inside the ``with`` block.

    The logits are part of the autograd graph, so their entropy can be added to the loss. Gradient
    checkpointing recomputes layers in the backward pass, after the block, so nothing is recorded twice.

    Args:
        model: A model with an adapter.

    Yields:
        The record, to which every forward pass appends.

    Raises:
        RuntimeError: If recordings are nested, or, at the end of the block, if trainable gates ran outside
            the autograd graph. Reentrant gradient checkpointing does that, and the entropy term would
            silently have no gradient.
    """
    record = GateRecord()
    gated = {name: layer for name, layer in adapted_linears(model).items() if layer.gate is not None}
    for name, layer in gated.items():
        if layer.gate_listener is not None:
            raise RuntimeError("record_gates is already active on this model; recordings cannot be nested")
        layer.set_gate_listener(partial(record.add, name))
    try:
        yield record
    finally:
        for layer in gated.values():
            layer.set_gate_listener(None)
    if torch.is_grad_enabled() and model.training:
        # grad_fn, not requires_grad, which a static gate's expanded bias has even outside the graph.
        lost = [
            name
            for name, logit in zip(record.names, record.logits, strict=True)
            if logit.grad_fn is None and any(p.requires_grad for p in gated[name].gate.parameters())  # type: ignore[union-attr]
        ]
        if lost:
            raise RuntimeError(
                f"the gates of {len(lost)} layers ({lost[0]}, …) ran outside the autograd graph: reentrant "
                "gradient checkpointing loses the entropy term. "
                "Use gradient_checkpointing_enable({'use_reentrant': False})."
            )
