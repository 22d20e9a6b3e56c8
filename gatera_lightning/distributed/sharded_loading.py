"""Load a sharded model so that only rank 0 ever holds it unsharded."""

import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import WeightFingerprint
from gatera_lightning.adapters.frozen_adapter import inject_frozen_adapter
from gatera_lightning.adapters.injection import InjectionReport, inject_adapters
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.adapters.lookup import adapted_linears, frozen_adapter
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.loading import load_backbone, load_config, prepare_for_training
from gatera_lightning.backbone.quantization import stored_quantization
from gatera_lightning.backbone.source import gguf_file
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError


@dataclass(frozen=True)
class _ModelDescription:
    """What the other ranks need to know of rank 0's model to build the same one without weights."""

    config: Any
    generation_config: Any  # it may name more tokens that end a text
    report: InjectionReport
    frozen_adapter: tuple[AdapterConfig, str] | None  # settings and digest; ranks may not have its folder
    fingerprints: dict[str, WeightFingerprint]
    dtypes: dict[str, torch.dtype]  # some models keep layers in fp32
    buffers: dict[str, torch.Tensor]  # also those that no state dict holds, such as rotary frequencies

    @classmethod
    def of(cls, model: PreTrainedModel, report: InjectionReport) -> "_ModelDescription":
        return cls(
            config=model.config,
            generation_config=model.generation_config,
            report=report,
            frozen_adapter=frozen_adapter(model),
            fingerprints={name: layer.base_fingerprint for name, layer in adapted_linears(model).items()},
            dtypes={name: parameter.dtype for name, parameter in model.named_parameters()},
            buffers=dict(model.named_buffers()),
        )


def load_sharded(
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    strategy: AdapterShardingStrategy,
    *,
    seed: int,
    warm_start: str | None,
) -> tuple[PreTrainedModel, InjectionReport]:
    """Load a backbone, inject the adapter, and shard the model over all ranks. Collective.

    Rank 0 loads the backbone into CPU memory and injects the adapter. Every rank builds the same modules on
    the meta device, shards them, and receives its shard of one tensor after the other.

    Args:
        backbone: Settings of the frozen model.
        adapter: Settings of the adapter.
        strategy: The strategy that shards the model.
        seed: Seed of the adapter's initial values.
        warm_start: An adapter folder to load the initial values from, if any.

    Returns:
        The sharded model, and which layers were adapted.

    Raises:
        ConfigError: As in ``load_backbone`` and ``inject_adapters``. Whatever rank 0 raises, all ranks raise.
    """
    full_model: PreTrainedModel | None = None
    message: _ModelDescription | Exception | None = None
    if strategy.global_rank == 0:
        try:
            _refuse_quantized_weights(backbone)
            full_model = load_backbone(backbone, strategy.root_device.type)
            report = inject_adapters(full_model, adapter, torch.Generator().manual_seed(seed))
            if warm_start is not None:
                load_adapter(full_model, warm_start)
            message = _ModelDescription.of(full_model, report)
        except Exception as error:  # of any kind: the other ranks wait for the message
            message = _picklable(error)
    message = strategy.broadcast(message)
    if isinstance(message, Exception):
        raise message
    assert message is not None  # rank 0 sent something

    model = _build_without_weights(message, backbone, adapter)
    strategy.shard(model)
    model.to_empty(device=torch.device("cpu") if strategy.cpu_offload else strategy.root_device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    # A broadcast sends memory, so a tensor that is stored by columns would arrive transposed.
    full = {} if full_model is None else {n: t.contiguous() for n, t in full_model.state_dict().items()}
    set_model_state_dict(model, full, options=options)
    for name, buffer in message.buffers.items():
        parent, _, leaf = name.rpartition(".")
        # Not register_buffer, which would turn a non-persistent buffer into a persistent one.
        setattr(model.get_submodule(parent), leaf, buffer.to(strategy.root_device))
    return model, message.report


def _refuse_quantized_weights(backbone: BackboneConfig) -> None:
    """Refuse a backbone that is stored quantized; the setting is checked before the run starts."""
    stored = None if gguf_file(backbone.id) else stored_quantization(load_config(backbone))
    if stored is not None:
        raise ConfigError(
            f"backbone.id: the weights of {backbone.id!r} are quantized ({stored}), and "
            "AdapterShardingStrategy cannot shard them; accepted: dense weights, or trainer.strategy auto or "
            "ddp"
        )


def _build_without_weights(
    description: _ModelDescription, backbone: BackboneConfig, adapter: AdapterConfig
) -> PreTrainedModel:
    """Build rank 0's model on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            description.config,
            attn_implementation=backbone.attn_implementation,
            trust_remote_code=backbone.trust_remote_code,
        )
    model.generation_config = description.generation_config
    if description.frozen_adapter is not None:
        inject_frozen_adapter(model, *description.frozen_adapter)
    inject_adapters(model, adapter)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(description.dtypes[name])
    for name, layer in adapted_linears(model).items():
        layer.set_base_fingerprint(description.fingerprints[name])
    prepare_for_training(model, backbone)
    return model


def _picklable(error: Exception) -> Exception:
    """Return an error to raise on all ranks: the error itself, or its text if it cannot be pickled."""
    if isinstance(error, ConfigError):
        error.on_every_rank = True
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an object's own code decides how pickling it fails
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
