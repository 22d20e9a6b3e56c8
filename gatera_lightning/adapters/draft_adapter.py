"""A second adapter that drafts tokens for a model, and that is no part of this model.

The model may have a trained adapter of its own. What trains, saves, identifies or records adapters sees only
that one, because a draft adapter acts through hooks, and only inside :meth:`DraftAdapter.on_last`.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import (
    WeightFingerprint,
    backbone_fingerprint,
    weight_fingerprint,
)
from gatera_lightning.adapters.frozen_adapter import adapter_digest
from gatera_lightning.adapters.identity import backbone_problem, non_finite_problem
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears, own_name, unwrapped
from gatera_lightning.adapters.mask_drafts import MASK_DRAFTS, MaskDrafts, stored_mask_drafts
from gatera_lightning.adapters.serialization import read_adapter
from gatera_lightning.errors import AdapterFileError, checks_arguments

log = logging.getLogger(__name__)

Layer = nn.Linear | AdaptedLinear


class LowRankFactors(NamedTuple):
    """The update ``u(x) = B A x`` of one layer, in the wider dtype of the adapter and the frozen weight.

    On CPUs, a matmul of a few rows is slower in 16 bits, and slower with weights that are not transposed.
    """

    a: Tensor
    """Aᵀ, (in, r)."""

    b: Tensor
    """``(α/r) · Bᵀ``, (r, out)."""


class DraftAdapter:
    """A LoRA that adds ``u(x)`` to the output of a model's layers, for the last tokens of a forward pass.

    Other tokens get the bits of the model without it. A layer may be adapted itself: a drafted token then
    gets ``W0 x + b + g(x) · u'(x) + u(x)``.

    Args:
        model: The model.
        layers: Its layers by name.
        factors: The update of each.
        config: The stored settings.
        mask_drafts: The mask embeddings, which the last tokens read instead of their ids, if there are any.

    Attributes:
        config: The stored settings.
        mask_drafts: The mask embeddings and the sampler head, if there are any.
        layer_names: Names of the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        factors: Mapping[str, LowRankFactors],
        config: AdapterConfig,
        mask_drafts: MaskDrafts | None = None,
    ) -> None:
        self.config = config
        self.mask_drafts = mask_drafts
        self._model = model
        self.layer_names = tuple(layers)
        self._pairs = [(layers[name], factors[name]) for name in layers]
        self._is_active = False

    @contextmanager
    def on_last(self, count: int, tokens: tuple[int, int]) -> Iterator[None]:
        """Inside the ``with`` block, add the update to the last tokens of every sequence.

        Args:
            count: How many tokens of each sequence; with 0, the model runs as it is.
            tokens: The shape (batch, tokens) of the forward pass.

        Raises:
            RuntimeError: If blocks are nested.
        """
        if self._is_active:
            raise RuntimeError("a draft adapter is active on this model already; blocks cannot be nested")
        with ExitStack() as hooks:
            self._is_active = True
            hooks.callback(self._end)
            for layer, factors in self._pairs if count else ():
                handle = layer.register_forward_hook(partial(_add_update, factors, count, tokens))
                hooks.callback(handle.remove)
            if count and self.mask_drafts is not None:
                depths = torch.arange(1, count + 1).unsqueeze(0)  # (1, count)
                hooks.enter_context(self.mask_drafts.on_last_rows(self._model, depths))
            yield

    def _end(self) -> None:
        self._is_active = False


def _add_update(
    factors: LowRankFactors,
    count: int,
    tokens: tuple[int, int],
    _: nn.Module,
    args: tuple[Any, ...],
    y: Tensor,
) -> Tensor:
    """Return a layer's output y (..., out) with the update added to the last tokens of every sequence."""
    x: Tensor = args[0]
    if tuple(x.shape[:-1]) not in (tokens, (tokens[0] * tokens[1],)):
        raise ValueError(
            f"a draft adapter: a layer sees tokens {tuple(x.shape[:-1])} of a forward pass of {tokens}; "
            "accepted: layers that see every token, which an expert does not"
        )
    drafted = x.reshape(*tokens, -1)[:, -count:].flatten(0, 1).to(factors.a.dtype)  # (batch · count, in)
    u = torch.mm(torch.mm(drafted, factors.a), factors.b)  # (batch · count, out)
    rows = y if y.ndim == 3 else y.unflatten(0, tokens)  # (batch, tokens, out), in the memory of y
    rows[:, -count:] += u.unflatten(0, (tokens[0], count))  # a layer's output is a new tensor
    return y


def draft_problem(config: AdapterConfig) -> str | None:
    """Describe why an adapter with these settings cannot draft; None if it can."""
    if config.update == "lora" and config.gate.kind in ("position", "none"):
        return None
    return (
        f"update {config.update!r} with gate {config.gate.kind!r} cannot draft; accepted: update 'lora' with "
        "gate 'position' or 'none'"
    )


@checks_arguments
@torch.no_grad()
def load_draft_adapter(model: nn.Module, folder: str | Path) -> DraftAdapter:
    """Load a draft adapter for a model, which stays as it is.

    Args:
        model: The model to draft for: a backbone, with or without a trained adapter.
        folder: An adapter folder with update lora and gate position, or a folder of PEFT's own LoRA.

    Raises:
        AdapterFileError: If a file is missing or corrupt, the adapter is no LoRA, or it belongs to another
            model.
    """
    model = unwrapped(model)
    stored, tensors = read_adapter(folder)
    config = stored.config
    if problem := draft_problem(config):
        raise AdapterFileError(f"{folder}: {problem}")
    modules = {own_name(name): module for name, module in model.named_modules()}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    prefix = f"{MASK_DRAFTS}."
    of_masks = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    mask_drafts, problem = stored_mask_drafts(model, config.gate.mask_embeddings, of_masks)
    if problem:
        raise _misfit(folder, f"does not fit this model: {problem}")
    of_layers = tensors.keys() - {f"{prefix}{name}" for name in of_masks}
    layers: dict[str, Layer] = {}
    factors: dict[str, LowRankFactors] = {}
    for name in sorted({name.rpartition(".update.")[0] for name in of_layers}):
        layer, a, b = modules.get(name), tensors.get(f"{name}.update.a"), tensors.get(f"{name}.update.b")
        if not isinstance(layer, Layer):
            raise _misfit(folder, f"does not fit this model, which has no linear layer {name}")
        if layer is head:
            raise _misfit(folder, f"adapts the head {name}, which does not see every token")
        if a is None or b is None:
            raise AdapterFileError(f"{folder}: {name} has only one of the factors A and B")
        stored_size, size = (a.shape[1], b.shape[0]), (layer.in_features, layer.out_features)
        if stored_size != size:
            raise _misfit(
                folder,
                f"does not fit this model: {name} has (inputs, outputs) {size}, and the draft adapter was "
                f"trained for {stored_size}",
            )
        layers[name] = layer
        dtype, device = torch.promote_types(a.dtype, layer.weight.dtype), layer.weight.device
        factors[name] = LowRankFactors(
            *(t.to(device, dtype).t().contiguous() for t in (a, b * config.scale_of(name)))
        )
    if problem := non_finite_problem(tensors):
        raise AdapterFileError(f"{folder}: {problem}; accepted: finite values")
    if stored.origin["fingerprint"] is not None:  # PEFT's own folders may have none
        prints = {name: _fingerprint(layer) for name, layer in layers.items()}
        own = {version: backbone_fingerprint(prints, version) for version in (1, 2, 3)}
        if problem := backbone_problem(own, stored.origin):
            raise _misfit(folder, problem.rstrip("."))
        if note := _other_adapter(model, stored.origin):
            log.info("%s: %s", folder, note)
    return DraftAdapter(model, layers, factors, config, mask_drafts)


def _misfit(folder: str | Path, problem: str) -> AdapterFileError:
    return AdapterFileError(
        f"{folder}: {problem}; accepted: a draft adapter of this model, or decoding without drafts"
    )


def _other_adapter(model: nn.Module, origin: Mapping[str, Any]) -> str | None:
    """Describe that a draft adapter was trained for this backbone with another adapter, or without one."""
    layers, trained = adapted_linears(model), origin.get("adapter_sha256")
    here = adapter_digest(model, next(iter(layers.values())).config) if layers else None
    if trained == here:
        return None
    then = "the backbone alone" if trained is None else f"the backbone with adapter SHA-256 {trained[:16]}"
    now = "has no adapter" if here is None else f"has adapter SHA-256 {here[:16]}"
    return (
        f"trained to draft for {then}, and this model {now}; the text stays the same, but fewer drafts may "
        "be accepted"
    )


def _fingerprint(layer: Layer) -> WeightFingerprint:
    return layer.base_fingerprint if isinstance(layer, AdaptedLinear) else weight_fingerprint(layer.weight)
