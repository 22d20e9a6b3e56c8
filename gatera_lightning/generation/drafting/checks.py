"""What drafting needs of a model and of the decoding."""

from transformers import DynamicCache, PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.adapters.position_mask import missing_mask_problem
from gatera_lightning.backbone.probes import caches_only_keys_and_values, reads_only_earlier_tokens
from gatera_lightning.generation.decoding import DecodingConfig

_PLAIN = "decoding without a draft adapter"


def model_problem(model: PreTrainedModel, block: int) -> str | None:
    """Describe why no drafts can be verified with a model; None if they can.

    Args:
        model: The model, with its weights.
        block: Tokens per block.
    """
    name = type(model).__name__
    for layer in adapted_linears(model).values():
        if problem := missing_mask_problem(layer.config):
            return f"draft: the model's own adapter: {problem}"
    if model.config.is_encoder_decoder or not hasattr(model, "generate"):
        return f"draft: {name} is no causal language model; accepted: one, or {_PLAIN}"
    if rope_type := _changing_rotation(model):
        return (
            f"draft: {name} has rope_type {rope_type!r}, whose rotation depends on the last row of a forward "
            f"pass, which may be a draft; accepted: a model with a fixed rotation, or {_PLAIN}"
        )
    if not caches_only_keys_and_values(model):
        return (
            f"draft: {name} has a state that cannot forget rejected drafts (a convolution's or a recurrent "
            f"layer's); accepted: a model that caches keys and values only, or {_PLAIN}"
        )
    windows = sliding_windows(model)
    if windows and min(windows) < block:
        return (
            f"draft.block: {block}, with a sliding window of {min(windows)} tokens; accepted: at most "
            f"{min(windows)}, or {_PLAIN}"
        )
    if not reads_only_earlier_tokens(model):
        return f"draft: the tokens of {name} attend to later ones; accepted: a causal model, or {_PLAIN}"
    return None


def _changing_rotation(model: PreTrainedModel) -> str | None:
    """Return the type of rotary embeddings that change with the last position of a pass, if it has them."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer = [entry for entry in parameters.values() if isinstance(entry, dict)]
    types = (entry.get("rope_type") for entry in (parameters, *by_layer))
    return next((kind for kind in types if kind in ("dynamic", "longrope")), None)


def block_problem(block: int, adapter: AdapterConfig) -> str | None:
    """Describe that a block has more drafts than the draft adapter has mask embeddings; None if not.

    Args:
        block: Tokens per block.
        adapter: The settings of the draft adapter.
    """
    masks = adapter.gate.mask_embeddings
    if not masks or block <= masks + 1:
        return None
    return (
        f"{block}, but the draft adapter has {masks} mask embeddings, one for each draft of a block; "
        f"accepted: 2 to {masks + 1}"
    )


def sliding_windows(model: PreTrainedModel) -> list[int]:
    """Return the sizes of the sliding windows of a model's attention layers, in tokens."""
    layers = DynamicCache(config=model.config).layers
    windows = (getattr(layer, "sliding_window", None) for layer in layers)
    return [window for window in windows if window is not None]


def decoding_problems(config: DecodingConfig) -> list[str]:
    """Describe every setting of the decoding that drafts do not support; empty if there is none."""
    accepted = {"beams": 1, "no_repeat_ngram_size": 0, "use_cache": True}
    return [
        f"decoding.{name}: {value}, with drafts; accepted: {accepted[name]}, or {_PLAIN}"
        for name in accepted
        if (value := getattr(config, name)) != accepted[name]
    ]
