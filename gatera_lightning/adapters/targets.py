"""Which linear layers of a model an adapter adapts, and with which rank and alpha each."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.linear_layers import weight_problem
from gatera_lightning.adapters.name_patterns import ended_name, ending, first_match, layer_index, matches
from gatera_lightning.adapters.target_problems import ALL_LINEAR
from gatera_lightning.adapters.updates import UPDATES
from gatera_lightning.errors import ConfigError, near_miss

_FUSED_PROJECTIONS = ("qkv_proj", "gate_up_proj", "query_key_value", "Wqkv", "c_attn")
_CLASSIFICATION_HEADS = ("score", "classifier")


def find_targets(
    model: nn.Module, config: AdapterConfig, *, stored: bool = False
) -> tuple[dict[str, nn.Linear], dict[str, int]]:
    """Find the linear layers to adapt; in a multimodal model, only those that process text.

    Args:
        model: The backbone.
        config: The adapter's settings.
        stored: Accept patterns without effect and ranks that exceed a layer's size, because the settings are
            those of an adapter folder, whose tensors are compared with the layers by name. PEFT accepts both,
            and writes some of such patterns itself.

    Returns:
        The layers by name, in model order, and the number of matches of each pattern.

    Raises:
        ConfigError: If a pattern or a layer index matches nothing, a rank exceeds a layer's size, or a layer
            is quantized. The error names all problems.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linears = {
        name: m for name, m in _linears(model, "", (model,)) if m is not head and _processes_text(model, name)
    }
    in_layers, problems = linears, _layers_problems(linears, config)
    without_effect = _exclude_problems(model, config)
    if config.layers is not None:
        indices = _positive(config.layers, linears)
        in_layers = {name: linear for name, linear in linears.items() if layer_index(name) in indices}
    if config.target_modules == ALL_LINEAR:
        heads = _other_heads(model)
        targets = {name: linear for name, linear in in_layers.items() if linear not in heads}
        targets = _without_excluded(targets, config)
        counts = dict(Counter(name.rpartition(".")[2] for name in targets))
        if not targets:
            reason = _nothing_left(ALL_LINEAR, linears, in_layers, config)
            without_effect.append(f"adapter.target_modules: {reason}")
    else:
        targets, counts = {}, {}
        for pattern in config.target_modules:
            matched = {name: linear for name, linear in in_layers.items() if _matches(pattern, name)}
            found = _without_excluded(matched, config)
            counts[pattern] = len(set(found.values()))
            targets.update(found)
            if not found and any(_matches(pattern, name) for name in linears):
                reason = _nothing_left(repr(pattern), matched, matched, config)
                without_effect.append(f"adapter.target_modules: {reason}")
            elif not found:
                problems.append(_no_match(model, pattern, linears, head))
    problems += _shared_layer_problems(targets, linears)
    if targets:
        without_effect += _pattern_problems(config, targets)
        without_effect += _rank_problems(targets, config)
        problems += _layer_problems(model, targets, config)
    if not (stored and targets):
        problems += without_effect
    if problems:
        raise ConfigError(problems)
    first_names = {linear: name for name, linear in reversed(linears.items())}
    return {name: linear for linear, name in reversed(first_names.items()) if name in targets}, counts


def positive_indices(model: nn.Module, layers: Iterable[int]) -> list[int]:
    """Return indices of decoder layers with -1 for the last one as those that name the layers.

    An index of no layer is returned as it is.
    """
    names = (name for name, _ in _linears(model, "", (model,)))
    return _positive(layers, (name for name in names if _processes_text(model, name)))


def _positive(layers: Iterable[int], names: Iterable[str]) -> list[int]:
    count = max((index for name in names if (index := layer_index(name)) is not None), default=-1) + 1
    return [index + count if -count <= index < 0 else index for index in layers]


def _layers_problems(linears: Iterable[str], config: AdapterConfig) -> list[str]:
    """Describe the indices of ``layers`` that are no layer's."""
    if config.layers is None:
        return []
    names = list(linears)
    existing = sorted({index for name in names if (index := layer_index(name)) is not None})
    found = zip(config.layers, _positive(config.layers, names), strict=True)
    missing = sorted({given for given, index in found if index not in existing})
    span = f"{existing[0]}…{existing[-1]}" if existing else "none"
    if not missing:
        return []
    return [f"adapter.layers: {missing} do not exist; the model's decoder layers are {span}"]


def _other_heads(model: nn.Module) -> set[nn.Module]:
    """Return what all-linear leaves out besides the output head: a tied head, or that of a classifier."""
    if not isinstance(model, PreTrainedModel):
        return set()
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    heads: set[nn.Module] = {
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) and any(m._parameters.get("weight") is weight for weight in embeddings)
    }
    if type(model).__name__.endswith("ForSequenceClassification"):
        heads |= {child for name, child in model.named_children() if name in _CLASSIFICATION_HEADS}
    return heads


def _without_excluded(found: Mapping[str, nn.Linear], config: AdapterConfig) -> dict[str, nn.Linear]:
    return {
        name: linear
        for name, linear in found.items()
        if not any(_matches(pattern, name) for pattern in config.exclude_modules)
    }


def _nothing_left(
    what: str, linears: Mapping[str, nn.Linear], in_layers: Mapping[str, nn.Linear], config: AdapterConfig
) -> str:
    """Describe why layers that the model has are not selected."""
    if in_layers:
        return f"{what} matches only what adapter.exclude_modules {config.exclude_modules} leaves out"
    if config.layers is not None:
        return f"{what} matches nothing in adapter.layers {config.layers}"
    return f"{what} matches nothing; this model has {_count_names(linears)}"


def _exclude_problems(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Describe the patterns of ``exclude_modules`` that no linear layer matches."""
    names = [name for name, _ in _linears(model, "", (model,))]
    last = {name.rpartition(".")[2] for name in names}
    return [
        f"adapter.exclude_modules: {pattern!r} matches no linear layer; this model has "
        f"{_count_names(names)}{near_miss(pattern, last)}"
        for pattern in config.exclude_modules
        if not any(_matches(pattern, name) for name in names)
    ]


def _pattern_problems(config: AdapterConfig, targets: Mapping[str, nn.Linear]) -> list[str]:
    """Describe the keys of ``rank_pattern`` and ``alpha_pattern`` that no adapted layer uses."""
    problems = []
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, setting))
        used = {name: first_match(keys, name) for name in targets}
        for key in keys:
            if key in used.values():
                continue
            shadowed = next((name for name in targets if matches(ending(key), name)), None)
            if shadowed is not None:
                reason = f"has no effect, because {used[shadowed]!r} stands before it and matches {shadowed}"
            else:
                last = {name.rpartition(".")[2] for name in targets}
                reason = (
                    f"matches no adapted layer; they are {_count_names(targets)}"
                    f"{near_miss(key, last | set(targets))}"
                )
            problems.append(f"adapter.{setting}: {key!r} {reason}")
    return problems


def _linears(module: nn.Module, name: str, parents: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every linear layer inside a module, a layer with several names once for each of them.

    A frozen adapted layer stands for the linear layer inside of it, and has its attributes.
    """
    for child_name, child in module._modules.items():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, AdaptedLinear) and child.frozen_digest is not None:
            yield path, cast(nn.Linear, child)
            continue
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


def _rank_problems(targets: dict[str, nn.Linear], config: AdapterConfig) -> list[str]:
    """Describe the first layer that is smaller than its rank, which a rank of this size would not need."""
    for name, linear in targets.items():
        smaller, rank = min(linear.in_features, linear.out_features), config.rank_of(name)
        if rank > smaller:
            key = first_match(config.rank_pattern, name)
            setting = "rank" if key is None else f"rank_pattern.{key}"
            return [
                f"adapter.{setting}: {rank} exceeds {name} ({linear.in_features} -> {linear.out_features}); "
                f"accepted here: 1 to {smaller}"
            ]
    return []


def _layer_problems(model: nn.Module, targets: dict[str, nn.Linear], config: AdapterConfig) -> list[str]:
    """Describe the first layer of an unsuitable size, and the first with an unsuitable weight."""
    problems = []
    for name, linear in targets.items():
        update = UPDATES[config.update]
        sizes = linear.in_features, linear.out_features
        if problem := update.size_problem(*sizes, **config.extra_settings):
            settings = ", ".join(f"adapter.{key}: {value}" for key, value in config.extra_settings.items())
            problems.append(f"{settings}, and {name} ({sizes[0]} -> {sizes[1]}): {problem}")
            break
    in_memory = any(not parameter.is_meta for parameter in model.parameters())
    unsuitable = (
        weight_problem(name, linear, others_have_memory=in_memory)
        for name, linear in targets.items()
        if not isinstance(linear, AdaptedLinear)  # checked when it was adapted
    )
    problems += [problem for problem in unsuitable if problem is not None][:1]
    return problems


def _count_names(names: Iterable[str]) -> str:
    """Return the last segments of names with how often each occurs."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{name} × {count}" for name, count in counts.items()) or "no nn.Linear at all"


def _matches(pattern: str, name: str) -> bool:
    ended = ended_name(pattern)  # a folder may list hundreds of names, for which an expression is slow
    if ended is not None and ended != pattern:
        return name == ended or name.endswith(f".{ended}")
    return name.rpartition(".")[2] == pattern or matches(pattern, name)


def _processes_text(model: nn.Module, name: str) -> bool:
    """Return whether the innermost Hugging Face model around a module takes token ids."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, PreTrainedModel):
            return parent.main_input_name == "input_ids"
    return True


def _no_match(model: nn.Module, pattern: str, linears: dict[str, nn.Linear], head: nn.Module | None) -> str:
    """Describe why ``pattern`` found nothing, and what the model has instead."""
    names = {name.rpartition(".")[2] for name in linears}
    counted = _count_names(linears)
    text = f"adapter.target_modules: {pattern!r} matches no linear layer; this model has {counted}"
    if fused := [name for name in _FUSED_PROJECTIONS if name in names]:
        text += f". {', '.join(fused)}: fused projections, adapted as one layer under that name"
    conv1d = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m).__name__ == "Conv1D"})
    if conv1d:
        text += f". {', '.join(conv1d)}: Conv1D layers (transposed weights), which cannot be adapted"
    if experts := expert_weights(model):
        weights = "mixture-of-experts weights in one 3-D parameter"
        text += f". {', '.join(experts)}: {weights}, which cannot be adapted"
    if head is not None and any(m is head and _matches(pattern, n) for n, m in model.named_modules()):
        text += ". The output head itself is never adapted"
    return text


def expert_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the last names of routed experts' weights: 3-D parameters that hold all experts of a layer."""
    found = set()
    for path, module in model.named_modules():
        if "expert" in f"{path}.{type(module).__name__}".lower():
            found |= {
                name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3
            }
    return tuple(sorted(found))
