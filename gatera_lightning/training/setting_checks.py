"""Checks of GateRAModule's own settings, by themselves and against the model."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.adapters.position_mask import missing_mask_problem
from gatera_lightning.adapters.serialization import read_adapter_config
from gatera_lightning.backbone.config import BackboneConfig
from gatera_lightning.backbone.probes import isolates_packed_sequences
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.generation.decoding import DecodingConfig
from gatera_lightning.objectives.base import Objective
from gatera_lightning.objectives.next_token import NextToken
from gatera_lightning.objectives.training_loss import objectives_problems
from gatera_lightning.training.optimizer import OptimizerConfig


def module_problems(
    backbone: BackboneConfig,
    adapter: AdapterConfig,
    optimizer: OptimizerConfig,
    decoding: DecodingConfig,
    warm_start: str | None,
    objectives: Sequence[Objective],
) -> list[str]:
    """Return one message for every setting that cannot work; empty if all are valid. Reads no weights."""
    problems = objectives_problems(objectives, adapter)
    problems += backbone.problems() + adapter.problems() + optimizer.problems() + decoding.problems()
    if backbone.compile and not adapter.problems() and adapter.gate.has_thresholds:
        gate = adapter.gate.to_dict()
        problems.append(
            f"backbone.compile: true, with adapter.gate.skip_below {gate['skip_below']} and merge_above "
            f"{gate['merge_above']}: thresholds give matmuls of varying size, which cannot be compiled; "
            "accepted: false, or 0 and 1"
        )
    elif backbone.compile and not adapter.problems() and adapter.gate.saturates:
        problems.append(
            f"backbone.compile: true, with a {adapter.gate.kind!r} gate: closed and open tokens give matmuls "
            "of varying size, which cannot be compiled; accepted: false, or another gate"
        )
    problems += objective_problems(objectives, adapter, backbone)
    if warm_start is not None:
        problems += _warm_start_problems(warm_start, adapter)
    return [f"model.{problem}" for problem in problems]


def objective_problems(
    objectives: Sequence[Objective], adapter: AdapterConfig, backbone: BackboneConfig
) -> list[str]:
    """Return one message for every setting that contradicts the objectives; empty if all are valid."""
    found = [problem for objective in objectives for problem in objective.problems(adapter, backbone)]
    found += _frozen_adapter_problems(adapter, backbone)
    mask = _mask_problem(adapter, objectives)
    return found if mask is None else [*found, mask]


def _frozen_adapter_problems(adapter: AdapterConfig, backbone: BackboneConfig) -> list[str]:
    """Refuse adapters over a trained one that could not decode with it: a draft adapter is no part of it."""
    gate = getattr(adapter.gate, "kind", adapter.gate)
    if backbone.adapter is None or (adapter.update, gate) == ("lora", "position"):
        return []
    return [
        f"backbone.adapter: {backbone.adapter!r}, with adapter.update {adapter.update!r} and adapter.gate "
        f"{gate!r}; accepted over a trained adapter: update lora and gate position, a draft adapter, or "
        "backbone.adapter null"
    ]


def check_stage(stage: str, adapter: AdapterConfig) -> None:
    """Raise ConfigError if a stage gives the adapter's gates no mask, as only objectives do."""
    if stage in ("test", "predict") and (problem := missing_mask_problem(adapter)):
        raise ConfigError(
            f"model.adapter.gate: {problem}, or the backbone without this adapter", on_every_rank=True
        )


def check_unpacked(data: Any, objectives: Sequence[Objective]) -> None:
    """Raise ConfigError if the data is packed and an objective does not support it.

    Args:
        data: The data module, or None.
        objectives: What is trained.
    """
    refusing = [type(objective).__name__ for objective in objectives if not objective.supports_packing]
    if refusing and getattr(data, "packing", False) is True:
        raise ConfigError(
            f"data.packing: true, but {refusing[0]} needs one sequence per row; accepted: false",
            on_every_rank=True,
        )


def _mask_problem(adapter: AdapterConfig, objectives: Sequence[Objective]) -> str | None:
    """Describe that no objective gives the masks that the gate needs; None if it needs none, or gets one."""
    if not getattr(adapter.gate, "needs_mask", False):  # the gate may be an unknown name
        return None
    names = ", ".join(type(objective).__name__ for objective in objectives)
    takes = f"adapter.gate: a {adapter.gate.kind!r} gate takes a mask of the tokens with every forward pass"
    if not any(objective.gives_position_mask for objective in objectives):
        return (
            f"{takes}, and no objective gives one ({names}); accepted: an objective with "
            "gives_position_mask, such as gatera_lightning.objectives.SelfDraft, or another gate"
        )
    if any(isinstance(each, NextToken) and not each.gives_position_mask for each in objectives):
        return f"{takes}, and NextToken gives none ({names}); accepted: objectives without NextToken"
    return None


def _warm_start_problems(folder: str, adapter: AdapterConfig) -> list[str]:
    try:
        stored, _ = read_adapter_config(folder)
    except AdapterFileError as error:
        return [f"warm_start: {error}; accepted: an adapter folder, or null"]
    values: list[tuple[str, Any, Any]] = [
        ("update", stored.update, adapter.update),
        ("gate", stored.gate.kind, getattr(adapter.gate, "kind", adapter.gate)),
    ]
    if stored.update == adapter.update:
        own = adapter.extra_settings
        values += [(name, value, own[name]) for name, value in stored.extra_settings.items()]
    if not stored.has_patterns and not adapter.has_patterns:  # else load_adapter compares layer by layer
        values += [("rank", stored.rank, adapter.rank), ("scale", stored.scale, adapter.scale)]
    return [
        f"warm_start: {folder} has {name} {there}, but model.adapter.{name} is {here}"
        for name, there, here in values
        if there != here and not (name == "gate" and there == "none")  # gates then start from their bias
    ]


def check_packing(model: PreTrainedModel, backbone: BackboneConfig) -> None:
    """Raise ConfigError if the model cannot isolate packed sequences; a collective if it is sharded."""
    if not isolates_packed_sequences(model):
        raise ConfigError(
            f"data.packing: true, but packed sequences influence each other in {type(model).__name__} with "
            f"backbone.attn_implementation {backbone.attn_implementation}; accepted: false"
        )


def check_adapter_parameters(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Raise RuntimeError if a parameter of the adapter was frozen or cast."""
    expected = getattr(torch, adapter.adapter_dtype)
    for name, parameter in adapter_parameters(model).items():
        if not parameter.requires_grad:
            raise RuntimeError(f"{name} should be trainable in {expected}, but is frozen")
        if parameter.dtype != expected:
            raise RuntimeError(f"{name} should be trainable in {expected}, but is {parameter.dtype}")
