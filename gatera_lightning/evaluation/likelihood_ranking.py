"""Multiple choice by likelihood: the model's answer is the candidate it finds most likely after the prompt."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gatera_lightning.datamodules.batch import Batch

Score = Literal["sum", "per_token", "per_character"]
"""How candidates of unequal length compete: by ``Σ log p``, or by it divided by their tokens or characters."""


def answer_log_likelihoods(
    logits: Tensor, targets: Tensor, kept: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor]:
    """``Σ log p`` of each row's counted target tokens (batch,) and their number (batch,).

    logits (1, n, vocabulary) and targets (n,) at the n positions where ``kept`` (batch, tokens) is true, in row order;
    ``counted`` (batch, tokens) says which of them belong to the answer.
    """
    token_ll = -F.cross_entropy(logits.squeeze(0).float(), targets, reduction="none")  # (n,)
    counts = counted[kept]  # (n,)
    rows = kept.nonzero()[:, 0][counts]
    total = torch.zeros(kept.shape[0], device=token_ll.device).index_add_(0, rows, token_ll[counts])
    return total, (counted & kept).sum(1)


@dataclass(frozen=True)
class RankedQuestion:
    """One question with the scores of its candidates, in the order of the candidates."""

    example: int
    gold: int
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]
    characters: tuple[int, ...]

    def choice(self, score: Score) -> int:
        """The candidate with the highest score; the first one of equals."""
        lengths = {"sum": [1] * len(self.tokens), "per_token": self.tokens, "per_character": self.characters}[
            score
        ]
        values = [ll / max(1, length) for ll, length in zip(self.log_likelihoods, lengths, strict=True)]
        return max(range(len(values)), key=values.__getitem__)


def ranked_questions(batch: Batch, log_likelihoods: Tensor, tokens: Tensor) -> list[RankedQuestion]:
    """The questions of a batch that holds every candidate of each; a row that stands for no example is left out.

    ``log_likelihoods`` and ``tokens`` (batch,) are those of :func:`answer_log_likelihoods`.
    """
    columns = [
        column.tolist() for column in (batch["example_ids"], batch["gold_ids"], batch["answer_characters"])
    ]
    rows: dict[int, list[tuple[int, float, int, int]]] = {}
    for example, gold, characters, ll, count in zip(
        *columns, log_likelihoods.tolist(), tokens.tolist(), strict=True
    ):
        if example >= 0:
            rows.setdefault(example, []).append((gold, ll, count, characters))
    return [
        RankedQuestion(
            example, answers[0][0], *(tuple(column) for column in list(zip(*answers, strict=True))[1:])
        )
        for example, answers in rows.items()
    ]
