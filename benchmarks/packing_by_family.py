"""Which causal-LM architectures of Transformers isolate packed sequences, and how exactly?

``python -m benchmarks.packing_by_family`` builds a tiny random model of every architecture in float64, asks
the probe that ``data.packing`` uses, and compares a packed row with separate rows. It prints a table.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gatera_lightning.backbone.probes import isolates_packed_sequences

MAX_PARAMETERS = 60e6
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
}
"""Set where an architecture's config has them."""

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT: dict[str, object] = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}
_LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu")
OWN_SIZES: dict[str, dict[str, object]] = {
    "bamba": _MAMBA,
    "falcon": {"head_dim": None},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 8, "mamba_dt_rank": 4},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": {**_CONVOLUTION, "num_dense_layers": 1},
    "lfm3": _CONVOLUTION,
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "minimax": _LINEAR,
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    **dict.fromkeys(_LATENT_ATTENTION, _LATENT),
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "attention_head_dim": 16,
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}
"""What some architectures need besides; None leaves out a size that the config does not accept."""


@dataclass(frozen=True)
class Finding:
    """What one architecture does with packed sequences."""

    family: str
    accepted: bool
    error: float
    """The largest difference between packed and separate rows, relative to the logits' standard deviation."""


def configs() -> Iterator[type[PreTrainedConfig]]:
    """Yield the config class of every causal-LM architecture in Transformers, by name."""
    yield from sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING.keys()), key=lambda config: config.model_type)


def tiny_model(config_class: type[PreTrainedConfig]) -> PreTrainedModel:
    """Build a tiny model in float64 whose logits differ clearly between tokens.

    Raises:
        Exception: Of any kind, if the architecture cannot be built from these sizes.
    """
    default, own = config_class(), OWN_SIZES.get(config_class.model_type, {})
    sizes = {name: size for name, size in SIZES.items() if hasattr(default, name)} | own
    config = config_class(**{name: size for name, size in sizes.items() if size is not None})
    with torch.device("meta"):
        elements = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if elements > MAX_PARAMETERS:
        raise ValueError(f"{elements:.1e} parameters at these sizes")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.config.use_cache = False
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")  # the others do not multiply float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(max(1.0, 0.2 / max(1e-3, float(parameter.std()))))
    return model


@torch.no_grad()
def packing_error(model: PreTrainedModel) -> float:
    """Compare a row of two packed sequences with two separate rows; see :class:`Finding`."""
    rows = [[(3 * i) % 89 + 3 for i in range(29)], [(7 * i) % 83 + 3 for i in range(31)]]
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    packed = model(
        input_ids=torch.tensor([[i for row in rows for i in row]]),
        attention_mask=None,
        position_ids=positions,
    ).logits
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows], 1)
    return float((packed - alone).abs().max() / alone.std())


def examine(config_class: type[PreTrainedConfig]) -> Finding | str:
    """Return what an architecture does, or in one line why it cannot be built."""
    try:
        model = tiny_model(config_class)
        return Finding(config_class.model_type, isolates_packed_sequences(model), packing_error(model))
    except Exception as error:  # an architecture's own code raises anything
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"


def main() -> None:
    """Print one line for every architecture that could be built, then the names of the others."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    found = {config.model_type: examine(config) for config in configs()}
    print("| architecture | `packing: true` | packed against separate rows |\n|---|---|---|")
    for family, finding in found.items():
        if isinstance(finding, Finding):
            print(f"| {family} | {'accepted' if finding.accepted else 'refused'} | {finding.error:.0e} |")
        else:
            print(f"{family}: {finding}", file=sys.stderr)
    print("\nNot built:", ", ".join(family for family, finding in found.items() if isinstance(finding, str)))


if __name__ == "__main__":
    main()
