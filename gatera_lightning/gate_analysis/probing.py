"""Gate profiles: the gates of one adapter on a few texts, which all reports and heatmaps are made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from gatera_lightning.errors import checks_arguments
from gatera_lightning.gate_analysis.capture import GatedModule, capture_gates
from gatera_lightning.gate_analysis.statistics import PHASES

ProfilePhase = Literal["prompt", "response", "response_read", "response_generated"]

EXAMPLE_TEXTS = (
    "Question: What do bees make?\nAnswer: honey",
    "I ride my bike to the lake every weekend. My two dogs run beside me.",
    "Tom has 3 boxes of 12 pencils. He gives 5 pencils away. How many are left? 3 * 12 - 5 = 31",
)


@dataclass(frozen=True)
class ProbeText:
    """A tokenized text whose gates are profiled."""

    title: str
    token_ids: list[int]
    """The prompt and the response."""

    prompt_length: int
    """The number of prompt tokens; all later tokens are the response."""

    generated: bool = False
    """Whether the model generated the response; else the response was given."""


@dataclass(frozen=True)
class GateProfile:
    """The gates of one adapter on several texts."""

    modules: list[GatedModule]
    texts: list[ProbeText]
    gates: list[np.ndarray]
    """One array (modules, tokens) for each text."""

    @property
    def phases(self) -> tuple[ProfilePhase, ...]:
        """The phases of the tokens; given and generated responses are separate if any were generated."""
        generated = {text.generated for text in self.texts}
        if True not in generated:
            return PHASES
        return (
            ("prompt", "response_read", "response_generated")
            if False in generated
            else ("prompt", "response_generated")
        )

    def non_finite_problem(self) -> str:
        """Describe the first gates that are NaN; an empty string if all are numbers.

        Gates are NaN where the adapter, the backbone or an activation between them is not finite.
        """
        for text, gates in zip(self.texts, self.gates, strict=True):
            if len(rows := np.flatnonzero(~np.isfinite(gates).all(1))):
                path = self.modules[int(rows[0])].path
                return f"the gates of {path} are NaN on the text {text.title!r}; their inputs are not finite"
        return ""

    def of_phase(self, phase: ProfilePhase) -> np.ndarray:
        """Return the gates (modules, tokens) of all tokens of one phase, over all texts.

        Args:
            phase: ``response`` means all responses, given or generated.
        """
        parts = []
        for text, gates in zip(self.texts, self.gates, strict=True):
            response_phases = ("response", "response_generated" if text.generated else "response_read")
            parts += [gates[:, : text.prompt_length]] if phase == "prompt" else []
            parts += [gates[:, text.prompt_length :]] if phase in response_phases else []
        return np.concatenate([np.empty((len(self.modules), 0), np.float32), *parts], 1)


@checks_arguments
def profile_gates(model: PreTrainedModel, texts: Sequence[ProbeText]) -> GateProfile:
    """Compute the gates of a model on texts, with one unpadded forward pass in eval mode for each text.

    Args:
        model: An adapted model; its training mode is restored afterwards.
        texts: The texts to profile.

    Returns:
        The gates of all texts.

    Raises:
        ValueError: The model has no gates.
    """
    modules: list[GatedModule] = []
    gates = []
    training = model.training
    model.eval()  # a gate reads its layer's input before dropout, but dropout in earlier layers changes it
    device = next(model.parameters()).device
    try:
        for text in texts:
            with torch.no_grad(), capture_gates(model) as captured:
                model(input_ids=torch.tensor([text.token_ids], device=device))
            if not captured.calls:
                raise ValueError("the model has no gates")
            modules = captured.modules
            gates.append(captured.calls[0].gates[:, 0].numpy())
    finally:
        model.train(training)
    return GateProfile(modules, list(texts), gates)
