"""Multiple choice by likelihood: the model's answer is the candidate with the highest score."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.datamodules.batch import Batch

Score = Literal["sum", "per_token", "per_character"]
"""Score of a candidate: ``Σ log p`` of its tokens, or this sum per token or per character."""


def answer_log_likelihoods(
    logits: Tensor, targets: Tensor, positions: Tensor, answer_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum ``log p`` over the answer tokens of each sequence.

    Args:
        logits: Logits at the n positions where ``positions`` is true, in row-major order, (1, n, vocabulary).
        targets: The token to predict at each of those positions, (n,).
        positions: Positions with logits, (batch, tokens), bool.
        answer_mask: Positions whose target belongs to the answer, (batch, tokens), bool.

    Returns:
        ``Σ log p`` of each answer in fp32, (batch,), and its number of tokens, (batch,).
    """
    token_log_p = -F.cross_entropy(logits.squeeze(0).float(), targets, reduction="none")  # (n,)
    in_answer = answer_mask[positions]  # (n,)
    sequences = positions.nonzero()[:, 0][in_answer]
    total = torch.zeros(positions.shape[0], device=token_log_p.device)
    return total.index_add_(0, sequences, token_log_p[in_answer]), (answer_mask & positions).sum(1)


@dataclass(frozen=True)
class RankedQuestion:
    """The candidates of one question with their log-likelihoods.

    Attributes:
        example: Index of the example within its split.
        gold: Index of the correct candidate.
        log_likelihoods: ``Σ log p`` of each candidate.
        tokens: Number of tokens of each candidate.
        characters: Number of characters of each candidate.
    """

    example: int
    gold: int
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def choice(self, score: Score) -> int:
        """Index of the candidate with the highest score; the first of equal ones."""
        lengths = {"sum": (1,) * len(self.tokens), "per_token": self.tokens, "per_character": self.characters}
        pairs = zip(self.log_likelihoods, lengths[score], strict=True)
        values = [log_p / max(1, length) for log_p, length in pairs]
        return max(range(len(values)), key=values.__getitem__)


def ranked_questions(batch: Batch, log_likelihoods: Tensor, tokens: Tensor) -> list[RankedQuestion]:
    """Group the candidates of a batch by question; dummy examples are left out.

    Args:
        batch: A batch with every candidate of each of its questions.
        log_likelihoods: ``Σ log p`` of each candidate, (batch,).
        tokens: Number of tokens of each candidate, (batch,).

    Returns:
        The questions in the order of the batch.
    """
    golds: dict[int, int] = {}
    candidates: dict[int, list[tuple[float, int, int]]] = {}
    for example, gold, log_p, count, characters in zip(
        batch["example_ids"].tolist(),
        batch["gold_ids"].tolist(),
        log_likelihoods.tolist(),
        tokens.tolist(),
        batch["answer_characters"].tolist(),
        strict=True,
    ):
        if example >= 0:
            golds.setdefault(example, gold)
            candidates.setdefault(example, []).append((log_p, count, characters))
    return [
        RankedQuestion(example, golds[example], *zip(*found, strict=True))
        for example, found in candidates.items()
    ]
