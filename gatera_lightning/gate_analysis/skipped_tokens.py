"""Count the tokens that gates skip, by module and layer: for gates that decide between 0 and 1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatera_lightning.adapters.gate_recording import GateRecord, record_gates
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.distributed.gather import gather_objects
from gatera_lightning.gate_analysis.capture import GatedModule


def gates_decide(model: nn.Module) -> bool:
    """Return whether the gates of a model are 0 or 1 in evaluation."""
    return any(layer.gate is not None and layer.gate.decides for layer in adapted_linears(model).values())


class SkippedTokens:
    """The share of tokens that each module skips in evaluation: those with a gate logit of at most 0."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._skipped: Tensor | None = None  # (modules,), on the device of the gates
        self._tokens: Tensor | None = None  # scalar

    def add(self, gates: GateRecord, mask: Tensor) -> None:
        """Count the gates of one forward pass; the values stay on the device.

        Args:
            gates: Recorded logits.
            mask: (batch, tokens), 1 for the tokens to count.
        """
        z = gates.stacked(mask)  # (modules, batch, tokens)
        if z is None:
            return
        counted = mask.to(z.device).bool()
        skipped, tokens = ((z <= 0) & counted).sum((1, 2)), counted.sum()
        self._names = list(gates.names)
        self._skipped = skipped if self._skipped is None else self._skipped + skipped
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def clear(self) -> None:
        """Forget all counts."""
        self._skipped = self._tokens = None

    def shares(self) -> dict[str, Any]:
        """Return the shares over all ranks; a collective.

        Returns:
            ``tokens``, ``share`` of all modules, and shares by ``layers`` and ``modules``; empty if nothing
            was counted.
        """
        own = None
        if self._skipped is not None and self._tokens is not None:
            own = self._names, self._skipped.tolist(), int(self._tokens)
        found = [counts for counts in gather_objects(own) if counts is not None]
        tokens = sum(count for _, _, count in found)
        if not tokens:
            return {}
        names = found[0][0]
        skipped = torch.tensor([counts for _, counts, _ in found]).sum(0) / tokens  # (modules,)
        layers = [GatedModule(name).layer for name in names]
        by_layer = {
            str(layer): float(skipped[[own == layer for own in layers]].mean())
            for layer in sorted(set(layers))
        }
        return {
            "tokens": tokens,
            "share": float(skipped.mean()),
            "layers": by_layer,
            "modules": dict(zip(names, skipped.tolist(), strict=True)),
        }


def describe_shares(shares: dict[str, Any]) -> str:
    """Return one line: the share of all modules, and of each layer."""
    layers = ", ".join(f"{layer}: {share:.0%}" for layer, share in shares["layers"].items())
    return f"{shares['share']:.1%} of {shares['tokens']:,} tokens; by layer {layers}"


@contextmanager
def counting_skipped_tokens(
    model: PreTrainedModel, counts: SkippedTokens, *, first_pass_only: bool
) -> Iterator[None]:
    """Count the non-padding tokens of the forward passes inside the ``with`` block.

    Args:
        model: The adapted model.
        counts: Where the counts are added.
        first_pass_only: Count the first forward pass alone: in generation, that of the prompts. Which of the
            texts of a batch have ended is not known here.
    """
    passes = 0

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 1 or not first_pass_only:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]  # (batch, tokens)
            mask = kwargs.get("attention_mask")
            is_plain = isinstance(mask, Tensor) and mask.ndim == 2
            counts.add(record, mask[:, -ids.shape[1] :] if is_plain else torch.ones_like(ids))  # type: ignore[index]
        record.clear()

    with record_gates(model) as record:
        handle = model.register_forward_hook(count, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
