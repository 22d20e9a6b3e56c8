"""Verify drafts with the model's own logits, so that the text is that of decoding without drafts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from gatera_lightning.generation.decoding import Sampling


class Draft(NamedTuple):
    """A drafted token."""

    token: int
    """Its id."""

    probabilities: Tensor | None = None
    """The distribution it was sampled from, (vocabulary,); None for the most likely token."""


class Verdict(NamedTuple):
    """What the model says about some drafts."""

    accepted: int
    """How many drafts it accepts, from the first one on."""

    token: int
    """The token after these: a correction of the next draft, or one more if it accepts all."""


class Verifier(Protocol):
    """Chooses drafts, and verifies them."""

    def propose(self, logits: Tensor) -> list[Draft]:
        """Choose a draft for each row of logits, (drafts, vocabulary)."""

    def verify(self, logits: Tensor, drafts: Sequence[Draft]) -> Verdict:
        """Verify drafts.

        Args:
            logits: The model's logits at the last token before the drafts and at each draft,
                (1 + drafts, vocabulary).
            drafts: The drafts.
        """


class GreedyVerifier:
    """Accepts the drafts that are the model's most likely tokens."""

    def propose(self, logits: Tensor) -> list[Draft]:
        """Choose the most likely token of each row, (drafts, vocabulary)."""
        return [Draft(token) for token in _most_likely(logits)]

    def verify(self, logits: Tensor, drafts: Sequence[Draft]) -> Verdict:
        """Accept the longest prefix of drafts that plain greedy decoding would choose."""
        own = _most_likely(logits)
        accepted = 0
        while accepted < len(drafts) and drafts[accepted].token == own[accepted]:
            accepted += 1
        return Verdict(accepted, own[accepted])


class SamplingVerifier:
    """Accepts a draft with probability ``min(1, p/q)``, so that tokens are distributed as sampled ones.

    After a rejection, the token is sampled from ``max(0, p - q)``, normalized (Leviathan et al. 2023).
    """

    def __init__(self, sampling: Sampling) -> None:
        self._warpers = [TemperatureLogitsWarper(sampling.temperature)]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))  # type: ignore[arg-type]

    def propose(self, logits: Tensor) -> list[Draft]:
        """Sample a token from each row, (drafts, vocabulary)."""
        if not len(logits):
            return []
        q = self._probabilities(logits)
        tokens = torch.multinomial(q, 1).squeeze(1).tolist()
        return [Draft(token, row) for token, row in zip(tokens, q, strict=True)]

    def verify(self, logits: Tensor, drafts: Sequence[Draft]) -> Verdict:
        """Accept or reject the drafts one after another, and sample the token after them."""
        p = self._probabilities(logits)  # (1 + drafts, vocabulary)
        for position, (token, q) in enumerate(drafts):
            assert q is not None  # propose sets it
            if float(torch.rand(())) * float(q[token]) < float(p[position, token]):
                continue
            residual = (p[position] - q).clamp_min(0)
            # p = q up to rounding leaves no residual, and then p is the distribution.
            return Verdict(position, _sample(residual if residual.any() else p[position]))
        return Verdict(len(drafts), _sample(p[len(drafts)]))

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Return what plain sampling draws from: (rows, vocabulary) -> (rows, vocabulary)."""
        scores = logits.float()
        for warper in self._warpers:
            scores = warper(None, scores)  # neither of them reads the ids
        return scores.softmax(-1)


def _most_likely(logits: Tensor) -> list[int]:
    found: list[int] = logits.float().argmax(-1).tolist()  # in float32, as Transformers' greedy decoding
    return found


def _sample(weights: Tensor) -> int:
    return int(torch.multinomial(weights, 1))
