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
    incomplete: int
    """Questions left out because a limit on the batches cut off some of their candidates."""

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

    State: ``keys`` (n, 6) = example, candidate, gold, candidates, task, tokens; ``scores`` (n,) = summed log-likelihood.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, batch: Batch, log_likelihoods: Tensor, tokens: Tensor) -> None:
        """Add one batch; rows with example id -1 stand for no example and are left out when computing."""
        names = ("example_ids", "answer_ids", "gold_ids", "candidate_counts", "task_ids")
        columns = [*(batch[name] for name in names), tokens]  # type: ignore[literal-required]
        self.keys.append(torch.stack(columns, dim=1))  # type: ignore[union-attr, operator]
        self.scores.append(log_likelihoods)  # type: ignore[union-attr, operator]

    def compute(self) -> tuple[Tensor, Tensor]:
        """``keys`` and ``scores`` of every process; :func:`ranked` makes a result of them."""
        return dim_zero_cat(self.keys), dim_zero_cat(self.scores)  # type: ignore[arg-type]


def ranked(keys: Tensor, scores: Tensor) -> RankingResult:
    """Questions in the order of their ids, from the two states of :class:`OptionRanking`.

    A question is judged only with all its candidates; others are counted as incomplete. Raises ValueError when a
    candidate was scored twice.
    """
    by_example: dict[int, dict[int, tuple[list[int], float]]] = defaultdict(dict)
    for key, score in zip(keys.reshape(-1, 6).tolist(), scores.reshape(-1).tolist(), strict=True):
        example, answer = key[:2]
        if example < 0:
            continue
        if answer in by_example[example]:
            raise ValueError(f"candidate {answer} of example {example} was scored twice")
        by_example[example][answer] = (key[2:], score)
    questions = []
    for example in sorted(by_example):
        answers = by_example[example]
        (gold, candidates, task, _), _ = next(iter(answers.values()))
        if len(answers) == candidates:
            rows = [answers[i] for i in range(candidates)]
            questions.append(RankedQuestion(example, task, gold, tuple(ll for _, ll in rows), tuple(key[3] for key, _ in rows)))
    return RankingResult(tuple(questions), incomplete=len(by_example) - len(questions))
