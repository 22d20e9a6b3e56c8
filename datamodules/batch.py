"""The batches that data modules yield: the contract between the data and everything that runs the model."""

from typing import NotRequired, TypedDict

from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that is not supervised, as in ``torch.nn.functional.cross_entropy``."""


class Batch(TypedDict):
    """Tokenized prompts with one answer each, right padded, for one forward pass.

    Every row of the tensors is one sequence (a prompt and an answer). In packed batches a row holds several
    sequences one after the other, so ``rows <= sequences``; otherwise ``rows == sequences``. The counts are
    Python integers, so reading them does not synchronize the device.
    """

    input_ids: Tensor
    """(rows, tokens), int64: token ids."""

    attention_mask: Tensor
    """(rows, tokens), int64: 1 for tokens, 0 for padding."""

    position_ids: NotRequired[Tensor]
    """(rows, tokens), int64: positions that restart at 0 with every sequence. Packed batches only."""

    labels: Tensor
    """(rows, tokens), int64: the token's own id if it is supervised, else ``IGNORE_INDEX``. Not shifted."""

    response_mask: Tensor
    """(rows, tokens), bool: True for tokens of the answer."""

    example_ids: Tensor
    """(sequences,), int64: index of the example within its split; -1 for a dummy example."""

    answer_ids: Tensor
    """(sequences,), int64: index of the candidate answer that the sequence holds."""

    gold_ids: Tensor
    """(sequences,), int64: index of the correct candidate."""

    answer_characters: Tensor
    """(sequences,), int64: characters of the answer's text."""

    all_candidates_present: bool
    """True if the batch holds all candidates of each of its examples, one example after the other."""

    step_supervised_tokens: int
    """Supervised tokens of the whole optimizer step, over all its micro-batches and ranks."""

    step_tokens: int
    """Non-padding tokens of the whole optimizer step, over all its micro-batches and ranks."""


class PromptBatch(TypedDict):
    """Tokenized prompts to generate from, left padded, so that all next tokens are in the same column."""

    input_ids: Tensor
    """(prompts, tokens), int64: token ids."""

    attention_mask: Tensor
    """(prompts, tokens), int64: 1 for tokens, 0 for padding."""

    example_ids: Tensor
    """(prompts,), int64: index of the example within its split; -1 for a dummy example."""

    pad_id: int
    """Id of the padding token."""

    eos_id: int
    """Id of the token that ends every answer in training."""
