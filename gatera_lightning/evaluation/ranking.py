"""Multiple choice by likelihood: the model's answer is the candidate it finds most likely after the prompt."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gatera_lightning.datamodules.tokens import Batch
from gatera_lightning.evaluation.intervals import Proportion

Score = Literal["sum", "per_token"]


def answer_log_likelihoods(logits: Tensor, targets: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """``Σ log p`` of each row's target tokens (batch,) and their number (batch,).

    logits (1, n, vocabulary) at the n positions where ``kept`` (batch, tokens) is true, in row order; targets (n,).
    """
    token_ll = -F.cross_entropy(logits.squeeze(0).float(), targets, reduction="none")  # (n,)
    rows = kept.nonzero()[:, 0]  # (n,)
    total = torch.zeros(kept.shape[0], device=token_ll.device).index_add_(0, rows, token_ll)
    return total, kept.sum(1)


@dataclass(frozen=True)
class RankedQuestion:
    """One question with the scores of its candidates, in the order of the candidates."""

    example: int
    task: int
    gold: int
    log_likelihoods: tuple[float, ...]
    tokens: tuple[int, ...]

    def choice(self, score: Score) -> int:
        """The candidate with the highest summed or per-token log-likelihood; the first one of equals."""
        values = [ll if score == "sum" else ll / max(1, n) for ll, n in zip(self.log_likelihoods, self.tokens, strict=True)]
        return max(range(len(values)), key=values.__getitem__)


@dataclass(frozen=True)
class RankingResult:
    """All questions of a split."""

    questions: tuple[RankedQuestion, ...]

    def accuracy(self, score: Score, task: int | None = None) -> Proportion:
        """Share of questions whose choice is the gold answer, of one task or of all."""
        asked = [q for q in self.questions if task is None or q.task == task]
        return Proportion(sum(q.choice(score) == q.gold for q in asked), len(asked))

    @property
    def gold_loss(self) -> float:
        """Mean nats per token of the right answers, over all their tokens."""
        tokens = sum(q.tokens[q.gold] for q in self.questions)
        return -sum(q.log_likelihoods[q.gold] for q in self.questions) / max(1, tokens)


class OptionRanking(Metric):
    """Collects candidate scores by example id, over batches and processes, in any order.

    State: ``keys`` (n, 5) = example, candidate, gold, task, tokens; ``scores`` (n,) = summed log-likelihood.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, batch: Batch, log_likelihoods: Tensor, tokens: Tensor) -> None:
        """Add one batch; rows with example id -1 stand for no example and are left out when computing."""
        columns = [batch["example_ids"], batch["answer_ids"], batch["gold_ids"], batch["task_ids"], tokens]
        self.keys.append(torch.stack(columns, dim=1))  # type: ignore[union-attr, operator]
        self.scores.append(log_likelihoods)  # type: ignore[union-attr, operator]

    def compute(self) -> tuple[Tensor, Tensor]:
        """``keys`` and ``scores`` of every process; :func:`ranked` makes a result of them."""
        return dim_zero_cat(self.keys), dim_zero_cat(self.scores)  # type: ignore[arg-type]


def ranked(keys: Tensor, scores: Tensor) -> RankingResult:
    """Questions in the order of their ids, from the two states of :class:`OptionRanking`.

    Raises ValueError when a candidate was scored twice or never.
    """
    by_example: dict[int, dict[int, tuple[int, int, int, float]]] = defaultdict(dict)
    for (example, answer, gold, task, tokens), score in zip(keys.tolist(), scores.tolist(), strict=True):
        if example < 0:
            continue
        if answer in by_example[example]:
            raise ValueError(f"candidate {answer} of example {example} was scored twice")
        by_example[example][answer] = (gold, task, tokens, score)
    questions = []
    for example in sorted(by_example):
        answers = by_example[example]
        if sorted(answers) != list(range(len(answers))):
            raise ValueError(f"example {example} lacks a candidate: only {sorted(answers)} were scored")
        rows = [answers[i] for i in range(len(answers))]
        gold, task = rows[0][:2]
        questions.append(RankedQuestion(example, task, gold, tuple(row[3] for row in rows), tuple(row[2] for row in rows)))
    return RankingResult(tuple(questions))
