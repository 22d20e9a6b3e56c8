"""Inject adapters into a model: find the matching linear layers, freeze the model and replace them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.adapters.mask_drafts import MASK_DRAFTS, build_mask_drafts
from gatera_lightning.adapters.save_pretrained import save_adapter_instead, save_whole_model_again
from gatera_lightning.adapters.targets import expert_weights, find_targets
from gatera_lightning.errors import ConfigError, checks_arguments


@dataclass(frozen=True)
class InjectionReport:
    """What :func:`inject_adapters` did."""

    layers: tuple[str, ...]
    """Names of the adapted linear layers, in model order."""

    matches: dict[str, int]
    """Number of layers that each pattern of ``target_modules`` matched; by last segment for all-linear."""

    trainable: int
    """Number of trainable elements, which are the adapter's."""

    frozen: int
    """Number of frozen elements, which are the backbone's."""

    experts: tuple[str, ...] = ()
    """Names of the weights of routed experts, which cannot be adapted and are left as they are."""

    def __str__(self) -> str:
        patterns = ", ".join(f"{pattern} × {count}" for pattern, count in self.matches.items())
        share = 100 * self.trainable / (self.trainable + self.frozen)
        text = (
            f"{len(self.layers)} adapted layers ({patterns}); "
            f"{self.trainable:,} trainable parameters ({share:.2f} %)"
        )
        return f"{text}; not adapted: the experts' {', '.join(self.experts)}" if self.experts else text


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace submodules of ``model`` under every name that they are registered under."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children omits second names
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def remove_adapters(model: nn.Module) -> None:
    """Put the frozen layers back in place of the adapted ones."""
    replace_modules(model, {layer: layer.base for layer in adapted_linears(model).values()})
    if hasattr(model, MASK_DRAFTS):
        delattr(model, MASK_DRAFTS)
    save_whole_model_again(model)


@checks_arguments
def inject_adapters(
    model: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None
) -> InjectionReport:
    """Freeze a model and replace every matching ``nn.Linear`` by an :class:`AdaptedLinear`, in place.

    Args:
        model: The backbone.
        config: The adapter's settings.
        generator: CPU generator that draws the initial values; the same generator gives every rank the same
            adapter.

    Returns:
        What was adapted.

    Raises:
        ConfigError: If a setting cannot work, a pattern matches no linear layer, the rank exceeds a layer's
            size, or the model is already adapted. The error names all problems. After any error, the model is
            as it was.
    """
    return inject(model, config, generator)


def inject(
    model: nn.Module,
    config: AdapterConfig,
    generator: torch.Generator | None = None,
    *,
    stored: bool = False,
) -> InjectionReport:
    """Inject adapters as :func:`inject_adapters` does; ``stored`` is that of :func:`find_targets`."""
    problems = config.problems()
    if adapted_linears(model):
        problems.append("the model is already adapted; load its backbone again to inject another adapter")
    if problems:
        raise ConfigError(problems)
    targets, matches = find_targets(model, config, stored=stored)

    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        adapted: dict[nn.Module, nn.Module] = {
            linear: AdaptedLinear(linear, config, generator, name=name).train(linear.training)
            for name, linear in targets.items()
        }
        masks = config.gate.mask_embeddings
        dtype = getattr(torch, config.adapter_dtype)
        mask_drafts = build_mask_drafts(model, masks, dtype, generator) if masks else None
    except Exception:  # an update or a gate of somebody else's may raise anything
        for parameter, trainable in was_trainable:
            parameter.requires_grad_(trainable)
        raise
    replace_modules(model, adapted)
    if mask_drafts is not None:
        model.add_module(MASK_DRAFTS, mask_drafts)
    save_adapter_instead(model)
    adapter = {id(p): p.numel() for p in adapter_parameters(model).values()}
    frozen = sum(p.numel() for p in model.parameters() if id(p) not in adapter)
    return InjectionReport(tuple(targets), matches, sum(adapter.values()), frozen, expert_weights(model))
