"""Settings of the gates whose value is a sigmoid: their start, and the entropy term."""

from dataclasses import dataclass

from gatera_lightning.adapters.gates.base import GateConfig, is_finite_number


@dataclass
class SigmoidGateConfig(GateConfig):
    """Settings that the static and the token gate share."""

    bias: float = 0.0
    """Initial gate logit b: 0 starts every gate at g = 0.5, -2 at g = 0.12."""

    entropy_weight: float = 0.01
    """Weight λ of the entropy term in the loss, which pushes gates towards 0 or 1; 0 turns it off."""

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        found = super().problems()
        if not is_finite_number(self.bias):
            found.append(f"adapter.gate.bias: {self.bias!r}; accepted: a finite number")
        if not (is_finite_number(self.entropy_weight) and self.entropy_weight >= 0):
            found.append(
                f"adapter.gate.entropy_weight: {self.entropy_weight!r}; accepted: a number of at least 0"
            )
        return found
