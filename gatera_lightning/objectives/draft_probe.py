"""Try whether a model's draft rows see in training what they see in decoding."""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gatera_lightning.adapters.position_mask import position_mask
from gatera_lightning.backbone.loading import context_length
from gatera_lightning.backbone.probes import caches_only_keys_and_values, eval_mode, packing_tolerances
from gatera_lightning.datamodules.batch import IGNORE_INDEX, Batch
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives.draft_forward import clean_rows, draft_rows
from gatera_lightning.objectives.draft_layout import DraftLayout

_TOKENS, _SIZE = 12, 3


@torch.no_grad()
def check_draft_rows(model: PreTrainedModel) -> None:
    """Compare the draft rows of one block with those that follow its seed in a plain forward pass.

    Models that keep another state than keys and values, ignore a given attention mask or positions fail. The
    trial draws no random numbers. It is a collective if the model is sharded.

    Raises:
        ConfigError: If they differ.
    """
    if not caches_only_keys_and_values(model):
        raise ConfigError(
            f"backbone.id: {type(model).__name__} keeps a state that cannot drop draft rows; accepted with "
            "SelfDraft: models whose cache holds keys and values only"
        )
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    length = min(_TOKENS, (context_length(model.config) or _TOKENS) - 1)
    ids = torch.tensor([[(3 * i) % 7 + 1 for i in range(length)]], device=device)
    labels = ids.clone()
    labels[:, : length - _SIZE - 2] = IGNORE_INDEX
    layout = DraftLayout.of(labels, _SIZE, torch.zeros(1, dtype=torch.long, device=device))
    noise = (ids.gather(1, layout.columns) * 2) % 5 + 1
    batch = cast(Batch, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with eval_mode(model):
        cache, _ = clean_rows(model, batch, layout, hidden=False)
        found = _double(draft_rows(model, batch, layout, noise, cache))[_SIZE:]
        seed = length - 2  # the second block begins behind it
        plain = torch.cat([ids[:, :seed], noise[:, _SIZE:]], 1)
        mask = torch.arange(plain.shape[1], device=device) >= seed
        with position_mask(model, mask):
            expected = _double(model(input_ids=plain, use_cache=False).logits[0, seed:])
    _, tolerance = packing_tolerances(model, device)
    tolerance = max(tolerance, 1e-5)  # eager attention computes its softmax in float32
    if float((found - expected).abs().max() / expected.std()) > tolerance:
        raise ConfigError(
            f"backbone.id: draft rows of {type(model).__name__} do not see the same in training and in "
            f"decoding with backbone.attn_implementation {model.config._attn_implementation}; accepted with "
            "SelfDraft: sdpa or eager, and models that follow a given attention mask and positions"
        )


def _double(logits: Tensor) -> Tensor:
    return logits.to("cpu", torch.float64)  # not every accelerator has float64
