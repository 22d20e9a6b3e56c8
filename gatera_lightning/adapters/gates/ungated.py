"""No gate: the update applies in full to every token."""

from dataclasses import dataclass

import torch

from gatera_lightning.adapters.gates.base import GateConfig


@dataclass
class NoGateConfig(GateConfig):
    """No gate: the update always applies in full."""

    kind = "none"
    formula = "1"

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: ``g = 1`` needs no module."""
        return None
