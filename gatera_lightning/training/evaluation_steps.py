"""What validation measures, and what a test or a prediction computes for a batch."""

from typing import cast, get_args

from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from gatera_lightning.backbone.probes import caches_only_keys_and_values
from gatera_lightning.datamodules.batch import Batch, PromptBatch
from gatera_lightning.evaluation.candidate_scoring import candidate_log_likelihoods
from gatera_lightning.evaluation.likelihood_ranking import Score, answer_log_likelihoods, ranked_questions
from gatera_lightning.generation.decoding import DecodingConfig, generate
from gatera_lightning.generation.drafting import Drafter
from gatera_lightning.objectives.next_token import (
    SupervisedLogits,
    shift_mask,
    summed_cross_entropy,
    supervised_logits,
)


class ValidationMetrics(nn.Module):
    """Means over the validation split: the loss of correct answers, and accuracies of ranking candidates."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy=float("inf"))  # a NaN must not be dropped from the mean
        self.accuracy = nn.ModuleDict({score: MeanMetric(nan_strategy="error") for score in get_args(Score)})

    def update(self, batch: Batch, found: SupervisedLogits) -> dict[str, MeanMetric]:
        """Add a batch: the loss of its correct answers, and accuracies if all candidates are present.

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
        return {"val/loss": self.loss} | {
            f"val/accuracy_{score}": self._accuracy(score) for score in get_args(Score)
        }

    def reset(self) -> None:
        """Reset all metrics: ``fit`` cannot add to the inference tensors that ``validate`` has left."""
        for metric in (self.loss, *map(self._accuracy, get_args(Score))):
            metric.reset()

    def _accuracy(self, score: Score) -> MeanMetric:
        return cast(MeanMetric, self.accuracy[score])


def answer_batch(
    model: PreTrainedModel,
    batch: Batch | PromptBatch,
    decoding: DecodingConfig,
    *,
    sharded: bool,
    drafter: Drafter | None = None,
) -> dict[str, Tensor]:
    """Score the candidate answers of a batch, or generate an answer to each of its prompts.

    Args:
        model: The adapted model.
        batch: Prompts with candidate answers, or prompts alone.
        decoding: How answers are generated; without its cache, candidates do not share the prompt's keys and
            values.
        sharded: Whether the weights are sharded, so that all ranks must run the same number of forward
            passes.
        drafter: What generates answers with drafts; not with sharded weights.

    Returns:
        ``log_likelihoods`` and ``tokens`` of each candidate (batch,), or ``generated`` token ids (batch, new
        tokens).
    """
    if "labels" not in batch:
        if drafter is not None:
            return {"generated": drafter.generate(batch, decoding)}
        return {"generated": generate(model, batch, decoding, in_step=sharded)}
    batch = cast(Batch, batch)
    if batch["all_candidates_present"] and decoding.use_cache and caches_only_keys_and_values(model):
        log_likelihoods, tokens = candidate_log_likelihoods(model, batch)
    else:
        found = supervised_logits(model, batch)
        log_likelihoods, tokens = answer_log_likelihoods(
            found.logits, found.labels, found.positions, answer_mask=found.positions
        )
    return {"log_likelihoods": log_likelihoods, "tokens": tokens}
