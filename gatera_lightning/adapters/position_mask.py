"""Give position gates the mask of a forward pass: which tokens an update applies to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates.position import GivenMask, PositionGate
from gatera_lightning.errors import checks_arguments


@checks_arguments
@contextmanager
def position_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside the ``with`` block, one forward pass of the model applies updates where the mask is True.

    ::

        with position_mask(model, mask):
            logits = model(input_ids).logits

    All other tokens get the frozen layers' own output, bit for bit. With gradient checkpointing, call
    ``backward`` inside the block too.

    Args:
        model: A model with position gates.
        mask: Bool, (batch, tokens), or (tokens,) for every sequence. With a cache of earlier tokens, the
            tokens are those of this forward pass.

    Raises:
        ValueError: If the model has no position gate, or the mask has another dtype or shape.
        RuntimeError: If blocks are nested, or a second forward pass runs inside the block.
    """
    gates = _position_gates(model)
    if not gates:
        raise ValueError(
            "position_mask: the model has no position gate; accepted: a model with AdapterConfig(gate="
            "'position')"
        )
    if mask.dtype != torch.bool or mask.ndim not in (1, 2):
        raise ValueError(
            f"position_mask: mask is {mask.dtype} {tuple(mask.shape)}; accepted: bool, (batch, tokens) or "
            "(tokens,)"
        )
    if any(gate.given is not None for gate in gates):
        raise RuntimeError("position_mask is already active on this model; masks cannot be nested")
    given, passes = GivenMask(mask.detach()), 0

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        nonlocal passes
        if passes:
            raise RuntimeError(
                "position_mask: its mask belongs to a forward pass that has run; accepted: one forward pass "
                "per block, and a new block with a new mask for the next one"
            )
        tokens = _shape_of_tokens(args, kwargs)
        if tokens is not None and (problem := given.problem(tokens)):
            raise ValueError(f"position_mask: {problem}; accepted: (batch, tokens) or (tokens,)")
        passes = 1

    hook = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    for gate in gates:
        gate.set_mask(given)
    try:
        yield
    finally:
        hook.remove()
        for gate in gates:
            gate.set_mask(None)


def missing_mask_problem(config: AdapterConfig) -> str | None:
    """Describe that an adapter needs masks, for programs that give none; None if it needs none."""
    if not config.gate.needs_mask:
        return None
    return (
        f"a {config.gate.kind!r} gate takes a mask of the tokens with every forward pass, which only code "
        "can give (gatera_lightning.position_mask); accepted here: another gate; a draft adapter belongs to "
        "--draft"
    )


def _position_gates(model: nn.Module) -> list[PositionGate]:
    """Return the position gates of all adapters; a layer of PEFT can have several."""
    return [module for module in model.modules() if isinstance(module, PositionGate)]


def _shape_of_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return (batch, tokens) of a language model's input; None if there is no such input."""
    first = args[0] if args else None
    ids, vectors = kwargs.get("input_ids", first), kwargs.get("inputs_embeds")
    if isinstance(vectors, Tensor):
        return tuple(vectors.shape[:-1])
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        return tuple(ids.shape)
    return None
