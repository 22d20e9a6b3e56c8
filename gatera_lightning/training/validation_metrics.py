"""What validation measures: the loss of the correct answers, and the accuracies of ranking candidate answers."""

from typing import cast, get_args

from torch import nn
from torchmetrics import MeanMetric

from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.evaluation.likelihood_ranking import Score, answer_log_likelihoods, ranked_questions
from gatera_lightning.objectives.next_token import SupervisedLogits, shift_mask, summed_cross_entropy


class ValidationMetrics(nn.Module):
    """Means over the whole validation split, whatever the batch sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy=float("inf"))  # a NaN must not be dropped from the mean
        self.accuracy = nn.ModuleDict({score: MeanMetric(nan_strategy="error") for score in get_args(Score)})

    def update(self, batch: Batch, found: SupervisedLogits) -> dict[str, MeanMetric]:
        """Add a batch: the loss per supervised token of its correct answers, and accuracies if all candidates are present.

        Args:
            batch: The batch.
            found: The model's logits for it.

        Returns:
            The metrics that were updated, by the name to log them under.
        """
        correct = batch["answer_ids"] == batch["gold_ids"]  # (batch,)
        of_correct = correct[found.positions.nonzero()[:, 0]]  # (n,)
        count = int(of_correct.sum())
        if count:
            loss = summed_cross_entropy(found.logits[:, of_correct], found.labels[of_correct])
            self.loss.update(loss / count, weight=count)
        if not batch["all_candidates_present"]:
            return {"val/loss": self.loss}
        answers = shift_mask(batch["response_mask"])
        scores = answer_log_likelihoods(found.logits, found.labels, found.positions, answers)
        questions = ranked_questions(batch, *scores)
        for score in get_args(Score):
            for question in questions:
                self._accuracy(score).update(float(question.choice(score) == question.gold))
        return {"val/loss": self.loss} | {f"val/accuracy_{score}": self._accuracy(score) for score in get_args(Score)}

    def reset(self) -> None:
        """Forget everything: sums from an earlier ``validate`` are inference tensors, which ``fit`` cannot add to."""
        for metric in (self.loss, *map(self._accuracy, get_args(Score))):
            metric.reset()

    def _accuracy(self, score: Score) -> MeanMetric:
        return cast(MeanMetric, self.accuracy[score])
