"""Reading the gates of one forward: live logits for the entropy term, detached ones for pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.injection import adapted_linears


@dataclass
class GateRecord:
    """Gate logits in the order in which the layers ran."""

    names: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, name: str, z: Tensor) -> None:
        """Keep the logits of layer ``name``."""
        self.names.append(name)
        self.logits.append(z)

    def stacked(self, mask: Tensor) -> Tensor | None:
        """All logits as one tensor (layers, batch, tokens); None without gates.

        ``mask`` (batch, tokens) gives the shape: some models flatten tokens before a linear layer. Raises
        ValueError where a layer saw other tokens than the batch's (a mixture of experts, say).
        """
        if not self.logits:
            return None
        for name, z in zip(self.names, self.logits, strict=True):
            if z.numel() != mask.numel():
                raise ValueError(
                    f"the gate of {name} saw {z.numel()} tokens of a batch of {tuple(mask.shape)}: which of them are "
                    "padding is unknown. Use gate 'none' for this layer, or leave it out of adapter.target_modules."
                )
        return torch.stack([z.reshape(mask.shape) for z in self.logits])


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecord]:
    """Collect the gate logits of every forward inside the ``with`` block.

    The logits are part of the autograd graph: add their entropy to the loss before backward. The recomputation of
    gradient checkpointing happens in backward, after the block, and is therefore never recorded twice.

    Raises RuntimeError when the block ends if gates that can learn were recorded without a graph: reentrant
    checkpointing does that, and the entropy term would be lost without a word.
    """
    record = GateRecord()
    gated = {name: layer for name, layer in adapted_linears(model).items() if layer.gate is not None}
    for name, layer in gated.items():
        if layer.on_gate is not None:
            raise RuntimeError("record_gates is already active on this model; recordings cannot be nested")
        layer.on_gate = lambda z, name=name: record.add(name, z)
    try:
        yield record
    finally:
        for layer in gated.values():
            layer.on_gate = None
    if torch.is_grad_enabled() and model.training:
        # no grad_fn: a static gate's expanded bias "requires grad" even where no graph was built
        lost = [
            name
            for name, z in zip(record.names, record.logits, strict=True)
            if z.grad_fn is None and any(p.requires_grad for p in gated[name].gate.parameters())  # type: ignore[union-attr]
        ]
        if lost:
            raise RuntimeError(
                f"the gates of {len(lost)} layers ({lost[0]}, …) ran outside the autograd graph: reentrant gradient "
                "checkpointing loses the entropy term. Use gradient_checkpointing_enable({'use_reentrant': False})."
            )
