"""Run decoder layers through ``torch.compile``: one graph for all layers and all sequence lengths.

Gate recorders append to Python lists, which would be different for every layer and would force a graph for
each. Therefore the gates' logits leave the graph together with the layer's output, and the recorders are
called outside of it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatera_lightning.adapters.layer import AdaptedLinear, GateListener
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.backbone.decoder_layers import decoder_layers
from gatera_lightning.errors import ConfigError

MAX_GRAPHS = 64
"""The most graphs in one process. A model has two, of its first layer, whose input needs no gradient, and of
the others; each of them again with and without padding, and for a batch of one sequence."""


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer of an adapted model for training, in place; no parameter changes its name.

    Shard a sharded model first: its hooks, like gradient checkpointing, stay outside of the graphs. The
    compiled model cannot be pickled, but its adapter is saved as usual. Four options of the compiler are set
    for the whole process.

    Raises:
        ConfigError: In the first forward pass, if a layer cannot be compiled into a single graph.
    """
    # Otherwise sizes that happen to be equal get a graph of their own.
    torch.fx.experimental._config.use_duck_shape = False
    # Otherwise every constant of a layer is an input, and everything is compiled twice.
    torch._dynamo.config.specialize_float = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    # Otherwise DDP splits a graph at its gradient buckets; every layer is a graph already.
    torch._dynamo.config.optimize_ddp = False
    compiled = torch.compile(_forward_with_logits, fullgraph=True, dynamic=True)
    for layer in decoder_layers(model):
        layer.forward = _CompiledForward(layer, compiled)


def _forward_with_logits(
    forward: Callable[..., Any], gated: Sequence[AdaptedLinear], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, list[tuple[int, Tensor]]]:
    """Run a decoder layer; return its output and the gates' logits, each with its index in ``gated``."""
    logits: list[tuple[int, Tensor]] = []

    def listener(index: int) -> GateListener:
        return lambda z: logits.append((index, z))

    for index, linear in enumerate(gated):
        linear.set_gate_listener(listener(index))
    output = forward(*args, **kwargs)
    for linear in gated:
        linear.set_gate_listener(None)
    return output, logits


class _CompiledForward:
    """The forward pass of one decoder layer: compiled in training mode, the original one otherwise."""

    def __init__(self, layer: nn.Module, compiled: Callable[..., Any]) -> None:
        self.layer = layer
        self.original = layer.forward
        self.gated = [linear for linear in adapted_linears(layer).values() if linear.gate is not None]
        self.compiled = compiled
        if getattr(layer, "gradient_checkpointing", False):  # recompute the graph as a whole, do not trace it
            layer.gradient_checkpointing = False  # type: ignore[assignment]
            self.compiled = partial(checkpoint, compiled, use_reentrant=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.original(*args, **kwargs)
        listeners = [linear.gate_listener for linear in self.gated]
        try:
            output, logits = self.compiled(self.original, self.gated, args, kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise ConfigError(
                f"model.backbone.compile: true, and {type(self.layer).__name__} cannot be compiled "
                f"({' '.join(str(error).split())[:300]}); accepted: false"
            ) from error
        finally:
            for linear, listener in zip(self.gated, listeners, strict=True):
                linear.set_gate_listener(listener)
        for index, z in logits:
            if (listener := listeners[index]) is not None:
                listener(z)
        return output
