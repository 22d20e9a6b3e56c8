"""A backbone that only the first process ever holds whole: built on the meta device, sharded, and filled from there."""

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.injection import InjectionReport, adapted_linears, inject_adapters
from gatera_lightning.adapters.serialization import load_adapter
from gatera_lightning.backbone.loading import BackboneConfig, load_backbone, ready_for_training
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError


def load_sharded(
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    strategy: AdapterShardingStrategy,
    *,
    seed: int,
    warm_start: str | None,
) -> tuple[PreTrainedModel, InjectionReport]:
    """The adapted model, sharded over the strategy's processes; a collective.

    The first process loads the backbone into the CPU's memory and puts the adapter into it; every process builds the same
    modules without memory, shards them, and receives its part of one tensor after another. What the first one raises, all
    raise.
    """
    first = strategy.global_rank == 0
    whole: PreTrainedModel | None = None
    told: dict[str, Any] = {}
    if first:
        try:
            whole = load_backbone(backbone, strategy.root_device.type)
            report = inject_adapters(whole, adapter, torch.Generator().manual_seed(seed))
            if warm_start is not None:
                load_adapter(whole, warm_start)
            told = {
                "config": whole.config,
                "generation_config": whole.generation_config,  # which may name further tokens that end a text
                "report": report,
                "fingerprints": {
                    name: layer.base_fingerprint for name, layer in adapted_linears(whole).items()
                },
                "dtypes": {name: parameter.dtype for name, parameter in whole.named_parameters()},
                "buffers": dict(
                    whole.named_buffers()
                ),  # those that no state dict has, such as rotary frequencies, included
            }
        except Exception as error:  # whatever it is: the others wait, and have to hear of it
            told = {"error": _that_travels(error)}
    told = strategy.broadcast(told)
    if "error" in told:
        raise told["error"]

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            told["config"],
            attn_implementation=backbone.attn_implementation,
            trust_remote_code=backbone.trust_remote_code,
        )
    model.generation_config = told["generation_config"]
    inject_adapters(model, adapter)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(told["dtypes"][name])  # models keep some layers in fp32
    for name, layer in adapted_linears(model).items():
        layer.base_fingerprint = told["fingerprints"][name]
    ready_for_training(model, backbone)
    strategy.shard(model)
    device = torch.device("cpu") if strategy.cpu_offload else strategy.root_device
    model.to_empty(device=device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, whole.state_dict() if whole is not None else {}, options=options)
    for name, buffer in told[
        "buffers"
    ].items():  # register_buffer would forget which of them a state dict leaves out
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = buffer.to(strategy.root_device)
    return model, told["report"]


def _that_travels(error: Exception) -> Exception:
    """An error that all processes raise: itself, or its text where pickle cannot carry it."""
    if isinstance(error, ConfigError):
        error.on_every_process = True
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # objects choose themselves how they fail to be pickled; the text is what is told then
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
