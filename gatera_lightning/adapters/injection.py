"""Inject adapters into a model: find the matching linear layers, freeze the model and replace them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.linear_layers import weight_problem
from gatera_lightning.adapters.lookup import adapted_linears, adapter_parameters
from gatera_lightning.adapters.name_patterns import matches
from gatera_lightning.errors import ConfigError, checks_arguments

_FUSED_PROJECTIONS = ("qkv_proj", "gate_up_proj", "query_key_value", "Wqkv", "c_attn")


@dataclass(frozen=True)
class InjectionReport:
    """What :func:`inject_adapters` did."""

    layers: tuple[str, ...]
    """Names of the adapted linear layers, in model order."""

    matches: dict[str, int]
    """Number of layers that each pattern of ``target_modules`` matched."""

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
    problems = config.problems()
    if adapted_linears(model):
        problems.append("the model is already adapted; load its backbone again to inject another adapter")
    if problems:
        raise ConfigError(problems)
    targets, matches = find_targets(model, config)

    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        adapted: dict[nn.Module, nn.Module] = {
            linear: AdaptedLinear(linear, config, generator).train(linear.training)
            for linear in targets.values()
        }
    except Exception:  # an update or a gate of somebody else's may raise anything
        for parameter, trainable in was_trainable:
            parameter.requires_grad_(trainable)
        raise
    replace_modules(model, adapted)
    adapter = {id(p): p.numel() for p in adapter_parameters(model).values()}
    frozen = sum(p.numel() for p in model.parameters() if id(p) not in adapter)
    return InjectionReport(tuple(targets), matches, sum(adapter.values()), frozen, _experts(model))


def find_targets(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, nn.Linear], dict[str, int]]:
    """Find the linear layers to adapt; in a multimodal model, only those that process text.

    Args:
        model: The backbone.
        config: The adapter's settings.

    Returns:
        The layers by name, in model order, and the number of matches of each pattern.

    Raises:
        ConfigError: If a pattern or a layer index matches nothing, the rank exceeds a layer's size, or a
            layer is quantized. The error names all problems.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linears = {
        name: m for name, m in _linears(model, "", (model,)) if m is not head and _processes_text(model, name)
    }
    problems = []
    in_layers = linears
    if config.layers is not None:
        index = {name: _layer_index(name) for name in linears}
        missing = sorted(set(config.layers) - set(index.values()))
        if missing:
            existing = sorted({i for i in index.values() if i is not None})
            span = f"{existing[0]}…{existing[-1]}" if existing else "none"
            problems.append(f"adapter.layers: {missing} do not exist; the model's decoder layers are {span}")
        in_layers = {name: linear for name, linear in linears.items() if index[name] in config.layers}

    targets: dict[str, nn.Linear] = {}
    matches = {}
    for pattern in config.target_modules:
        found = {name: linear for name, linear in in_layers.items() if _matches(pattern, name)}
        matches[pattern] = len(set(found.values()))
        targets.update(found)
        if not found and any(_matches(pattern, name) for name in linears):
            problems.append(
                f"adapter.target_modules: {pattern!r} matches nothing in adapter.layers {config.layers}"
            )
        elif not found:
            problems.append(_no_match(model, pattern, linears, head))
    problems += _shared_layer_problems(targets, linears)
    problems += _layer_problems(model, targets, config.rank)
    if problems:
        raise ConfigError(problems)
    first_names = {linear: name for name, linear in reversed(linears.items())}
    return {name: linear for linear, name in reversed(first_names.items()) if name in targets}, matches


def _linears(module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every linear layer inside a module, a layer with several names once for each of them."""
    for child_name, child in module._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.Linear):
            yield path, child
        if child is not None and child not in parents:
            yield from _linears(child, path, (*parents, child))


def _shared_layer_problems(targets: dict[str, nn.Linear], linears: dict[str, nn.Linear]) -> list[str]:
    """Describe the first layer that is selected under one of its names only."""
    selected = {linear: name for name, linear in targets.items()}
    for name, linear in linears.items():
        if linear in selected and name not in targets:
            return [
                f"adapter.target_modules: {selected[linear]} is the same layer as {name}, which is not "
                "selected; accepted: both or neither, in target_modules and in layers"
            ]
    return []


def _layer_problems(model: nn.Module, targets: dict[str, nn.Linear], rank: int) -> list[str]:
    """Describe the first layer that is too small for the rank, and the first with an unsuitable weight."""
    problems = []
    for name, linear in targets.items():
        smaller = min(linear.in_features, linear.out_features)
        if rank > smaller:
            problems.append(
                f"adapter.rank: {rank} exceeds {name} ({linear.in_features} -> {linear.out_features}); "
                f"accepted here: 1 to {smaller}"
            )
            break
    in_memory = any(not parameter.is_meta for parameter in model.parameters())
    unsuitable = (
        weight_problem(name, linear, others_have_memory=in_memory) for name, linear in targets.items()
    )
    problems += [problem for problem in unsuitable if problem is not None][:1]
    return problems


def _matches(pattern: str, name: str) -> bool:
    return name.rpartition(".")[2] == pattern or matches(pattern, name)


def _processes_text(model: nn.Module, name: str) -> bool:
    """Return whether the innermost Hugging Face model around a module takes token ids."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, PreTrainedModel):
            return parent.main_input_name == "input_ids"
    return True


def _layer_index(name: str) -> int | None:
    """Return the first number in a module's path: ``model.layers.7.mlp.up_proj`` -> 7."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _no_match(model: nn.Module, pattern: str, linears: dict[str, nn.Linear], head: nn.Module | None) -> str:
    """Describe why ``pattern`` found nothing, and what the model has instead."""
    names = Counter(name.rpartition(".")[2] for name in linears)
    text = f"adapter.target_modules: {pattern!r} matches no linear layer; this model has " + (
        ", ".join(f"{name} × {count}" for name, count in names.items()) or "no nn.Linear at all"
    )
    if fused := [name for name in names if name in _FUSED_PROJECTIONS]:
        text += f". {', '.join(fused)}: fused projections, adapted as one layer under that name"
    conv1d = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ == "Conv1D"})
    if conv1d:
        text += f". {', '.join(conv1d)}: Conv1D layers (transposed weights), which cannot be adapted"
    if experts := _experts(model):
        weights = "mixture-of-experts weights in one 3-D parameter"
        text += f". {', '.join(experts)}: {weights}, which cannot be adapted"
    if head is not None and any(m is head and _matches(pattern, n) for n, m in model.named_modules()):
        text += ". The output head itself is never adapted"
    return text


def _experts(model: nn.Module) -> tuple[str, ...]:
    """Return the last names of routed experts' weights: 3-D parameters that hold all experts of a layer."""
    found = set()
    for path, module in model.named_modules():
        if "expert" in f"{path}.{type(module).__name__}".lower():
            found |= {
                name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3
            }
    return tuple(sorted(found))
