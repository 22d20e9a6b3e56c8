"""Decoder layers through ``torch.compile``: one graph serves all layers and all lengths of rows, and returns its gates.

Recorders append to lists of Python's, in which a compiler would see something new with every layer. So each layer's gate logits
leave its graph beside its output, and the recorders are told outside.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatera_lightning.adapters.injection import adapted_linears
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.distributed.sharding import decoder_layers
from gatera_lightning.errors import ConfigError

GRAPHS = 64
"""At most, in one process. A model has two, of its first layer, whose input needs no gradient, and of the others; each again
with and without padding, and for a single row."""


def compile_layers(model: nn.Module) -> None:
    """Let every decoder layer of an adapted model run compiled where it trains, in place; all names stay as they are.

    A sharded model is sharded before: its hooks stay outside of the graphs, as gradient checkpointing does. The first forward
    raises ConfigError where a layer cannot be compiled whole. Sets four options of the compiler for the whole process; the
    model can then not be pickled whole, but its adapter is saved as ever.
    """
    torch.fx.experimental._config.use_duck_shape = (
        False  # or sizes that happen to be equal make a graph of their own
    )
    torch._dynamo.config.specialize_float = (
        True  # or every constant of a layer is an input, and everything compiled twice
    )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    torch._dynamo.config.optimize_ddp = (
        False  # or DDP cuts a graph by its buckets of gradients: each layer is one already
    )
    compiled = torch.compile(_with_logits, fullgraph=True, dynamic=True)
    for layer in decoder_layers(model):
        layer.forward = _CompiledForward(layer, compiled)


def _with_logits(
    forward: Callable[..., Any], gated: Sequence[AdaptedLinear], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, list[tuple[int, Tensor]]]:
    """What a decoder layer returns, and the gates' logits in the order in which they ran, each with its place in ``gated``."""
    ran: list[tuple[int, Tensor]] = []
    for place, linear in enumerate(gated):
        linear.on_gate = lambda z, place=place: ran.append((place, z))
    returned = forward(*args, **kwargs)
    for linear in gated:
        linear.on_gate = None
    return returned, ran


class _CompiledForward:
    """The forward of one decoder layer: compiled while it trains, its own otherwise."""

    def __init__(self, layer: nn.Module, compiled: Callable[..., Any]) -> None:
        self.layer = layer
        self.own = layer.forward
        self.gated = [linear for linear in adapted_linears(layer).values() if linear.gate is not None]
        self.compiled = compiled
        if getattr(layer, "gradient_checkpointing", False):  # recomputing the graph, not within it
            layer.gradient_checkpointing = False  # type: ignore[assignment]
            self.compiled = partial(checkpoint, compiled, use_reentrant=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.own(*args, **kwargs)
        listening = [linear.on_gate for linear in self.gated]
        try:
            returned, ran = self.compiled(self.own, self.gated, args, kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise ConfigError(
                f"model.backbone.compile: true, and {type(self.layer).__name__} cannot be compiled "
                f"({' '.join(str(error).split())[:300]}); accepted: false"
            ) from error
        finally:
            for linear, listener in zip(self.gated, listening, strict=True):
                linear.on_gate = listener
        for place, z in ran:
            if (listener := listening[place]) is not None:
                listener(z)
        return returned
