"""What the gates of one adapter do on some texts: the numbers behind every picture of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from gatera_lightning.gate_analysis.capture import GatedModule, capture_gates
from gatera_lightning.gate_analysis.statistics import PHASES

ReadingPhase = Literal["prompt", "response", "response_read", "response_generated"]

EXAMPLE_TEXTS = (
    "Question: What do bees make?\nAnswer: honey",
    "I ride my bike to the lake every weekend. My two dogs run beside me.",
    "Tom has 3 boxes of 12 pencils. He gives 5 pencils away. How many are left? 3 * 12 - 5 = 31",
)


@dataclass(frozen=True)
class ProbeText:
    """A text to look at, as tokens; those from ``prompt`` on are the response."""

    title: str
    ids: list[int]
    prompt: int
    decoded: bool = False
    """Whether the response was generated, token by token, rather than read."""


@dataclass(frozen=True)
class GateReading:
    """Gates (modules, tokens) of every text, by one adapter."""

    modules: list[GatedModule]
    texts: list[ProbeText]
    gates: list[np.ndarray]

    @property
    def phases(self) -> tuple[ReadingPhase, ...]:
        """What its tokens fall into: those of responses apart, by whether they were read or generated, where any were."""
        generated = {text.decoded for text in self.texts}
        if True not in generated:
            return PHASES
        return (
            ("prompt", "response_read", "response_generated")
            if False in generated
            else ("prompt", "response_generated")
        )

    def of(self, phase: ReadingPhase) -> np.ndarray:
        """Gates (modules, tokens) of all texts' tokens of one phase; ``response`` is every response."""
        parts = []
        for text, gates in zip(self.texts, self.gates, strict=True):
            response = ("response", "response_generated" if text.decoded else "response_read")
            parts += [gates[:, : text.prompt]] if phase == "prompt" else []
            parts += [gates[:, text.prompt :]] if phase in response else []
        return np.concatenate([np.empty((len(self.modules), 0), np.float32), *parts], 1)


def read_gates(model: PreTrainedModel, texts: Sequence[ProbeText]) -> GateReading:
    """One forward a text, without padding. Raises ValueError when the model has no gates."""
    modules: list[GatedModule] = []
    gates = []
    training = model.training
    model.eval()  # gates stand before dropout, but what they see comes behind it
    device = next(model.parameters()).device
    try:
        for text in texts:
            with torch.no_grad(), capture_gates(model) as captured:
                model(input_ids=torch.tensor([text.ids], device=device))
            if not captured.calls:
                raise ValueError("the model has no gates")
            modules = captured.modules
            gates.append(captured.calls[0].gates[:, 0].numpy())
    finally:
        model.train(training)
    return GateReading(modules, list(texts), gates)
