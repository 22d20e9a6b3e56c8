"""Run a model on the clean rows and on the draft rows of a batch.

Both are the halves of one sequence [draft rows | clean rows]. Clean rows attend to no draft row and no update
acts on them, so they need no graph: their keys and values are computed first, as in generation, and the draft
rows run after them. Compared with one sequence, the backward pass visits draft rows only.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gatera_lightning.adapters.position_mask import position_mask
from gatera_lightning.backbone.probes import eval_mode, replaced_forward
from gatera_lightning.backbone.recomputation import recompute_elementwise
from gatera_lightning.datamodules.batch import Batch
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives.draft_layout import DraftLayout
from gatera_lightning.objectives.next_token import head_only_at
from gatera_lightning.objectives.total_variation import (
    compare_hidden,
    compare_logits,
    linear_total_variation,
    total_variation,
)


def summed_total_variation(
    model: PreTrainedModel, batch: Batch, layout: DraftLayout, ids: Tensor, *, in_head: bool
) -> Tensor:
    """Sum the total variation between draft rows and clean rows.

    Args:
        model: The adapted model.
        batch: The batch, not packed.
        layout: Its draft rows.
        ids: Token ids of the draft rows, (batch, rows).
        in_head: Whether the head computes it, without storing logits; the model must return just what its
            head computes.

    Returns:
        A scalar, part of the autograd graph through the draft rows.
    """
    loss = linear_total_variation if in_head else total_variation
    return _compared(model, batch, layout, ids, loss, in_head=in_head).squeeze()


@torch.no_grad()
def compared_predictions(
    model: PreTrainedModel, batch: Batch, layout: DraftLayout, ids: Tensor, *, in_head: bool
) -> Tensor:
    """Compare draft rows with clean rows; arguments as for :func:`summed_total_variation`.

    Returns:
        (n, 2) for the n draft rows: the total variation, and whether the most likely token is the same.
    """
    compare = compare_hidden if in_head else compare_logits
    return _compared(model, batch, layout, ids, compare, in_head=in_head).view(-1, 2)


def _compared(
    model: PreTrainedModel,
    batch: Batch,
    layout: DraftLayout,
    ids: Tensor,
    compare: Callable[..., Tensor],
    *,
    in_head: bool,
) -> Tensor:
    cache, expected = clean_rows(model, batch, layout, hidden=in_head)
    if not in_head:
        return compare(draft_rows(model, batch, layout, ids, cache), expected)
    head = model.get_output_embeddings()

    def compute(hidden: Tensor) -> Tensor:  # inside the model's forward pass: a sharded head is whole there
        compared = compare(hidden.squeeze(0), expected, head.weight, head.bias)
        return compared.view(1, -1, compared.shape[-1] if compared.ndim else 1)

    return draft_rows(model, batch, layout, ids, cache, compute)


def clean_rows(
    model: PreTrainedModel, batch: Batch, layout: DraftLayout, *, hidden: bool
) -> tuple[DynamicCache, Tensor]:
    """Run the frozen model on the sequences, as in generation.

    Args:
        model: The adapted model.
        batch: The batch.
        layout: Its draft rows.
        hidden: Whether to return hidden states instead of logits.

    Returns:
        The keys and values of all tokens, and the logits (n, vocabulary) at the supervised tokens, or the
        hidden states (n, width) that the head receives.
    """
    ids = batch["input_ids"]
    positions = layout.selects_clean(ids.shape[1])
    cache = DynamicCache()
    head = model.get_output_embeddings()
    replaced = replaced_forward(head, lambda states: states) if hidden else nullcontext()
    no_update = position_mask(model, torch.zeros_like(positions))
    with torch.no_grad(), eval_mode(model), no_update, head_only_at(model, positions), replaced:
        found = model(
            input_ids=ids, attention_mask=batch["attention_mask"], past_key_values=cache, use_cache=True
        ).logits
    return cache, found.squeeze(0)


def draft_rows(
    model: PreTrainedModel,
    batch: Batch,
    layout: DraftLayout,
    ids: Tensor,
    cache: DynamicCache,
    in_head: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Run the adapted model on the draft rows, which attend to the clean rows in the cache.

    Args:
        model: The adapted model.
        batch: The batch.
        layout: Its draft rows.
        ids: Their token ids, (batch, rows).
        cache: What :func:`clean_rows` returned; draft rows are appended.
        in_head: What the head computes from hidden states (1, n, width), instead of logits.

    Returns:
        Logits (n, vocabulary) of the draft rows, or what ``in_head`` returned.

    Raises:
        ConfigError: If a sequence is longer than the model's sliding window.
    """
    _check_window(model, batch["input_ids"].shape[1])
    device = batch["input_ids"].device
    visible = layout.attention_mask(batch["attention_mask"], model.dtype).to(device)
    replaced = nullcontext() if in_head is None else replaced_forward(model.get_output_embeddings(), in_head)
    updated = position_mask(model, layout.is_draft)
    with updated, recompute_elementwise(), head_only_at(model, layout.is_draft), replaced:
        output = model(
            input_ids=ids.to(device),
            attention_mask=visible,
            position_ids=layout.columns.to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return cast(Tensor, output if in_head is not None else output.squeeze(0))


def _check_window(model: PreTrainedModel, tokens: int) -> None:
    """Refuse sequences of which a layer would see a part: the mask of draft rows covers all clean rows."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and tokens > window:
        raise ConfigError(
            f"data.max_length: a sequence has {tokens} tokens, and {type(model).__name__} has sliding "
            f"windows of {window}; accepted with SelfDraft: at most {window}"
        )
