"""Record gates of every forward pass of an adapted model, ``generate`` included. Works without Lightning."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gate_recording import record_gates
from gatera_lightning.errors import checks_arguments
from gatera_lightning.gate_analysis.row_identity import RowTracker, tracked_generation

Phase = Literal["prefill", "decoding"]

_COLUMNS = ("call", "phase", "row", "position", "token_id", "layer", "module", "gate")


@dataclass(frozen=True)
class GatedModule:
    """The place of a gate: ``model.layers.3.self_attn.q_proj`` is layer 3, projection type ``q_proj``."""

    path: str

    @property
    def layer(self) -> int:
        """The index of the decoder layer; −1 if the path has none."""
        return next((int(part) for part in self.path.split(".") if part.isdecimal()), -1)

    @property
    def projection(self) -> str:
        """The projection type: the last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class GateCall:
    """The gates of one forward pass."""

    phase: Phase
    """``decoding`` if the forward continued an earlier one, else ``prefill``."""

    input_ids: Tensor | None
    """(batch, tokens); None for a forward from embeddings."""

    non_padding: Tensor
    """(batch, tokens), True at every token of a text: not at padding, nor after ``generate`` ended it."""

    positions: Tensor
    """(batch, tokens): the index of each token among the non-padding tokens of its row."""

    gates: Tensor
    """(modules, batch, tokens), ``g = σ(z)`` in fp32."""

    cached: int = 0
    """Number of earlier tokens, padding included, from whose keys the forward continued."""

    repeated: int = 0
    """Number of leading tokens, padding included, that ``generate`` without a cache had read before."""


@dataclass
class GateCapture:
    """The gates of all forward passes inside :func:`capture_gates`, on the CPU."""

    modules: list[GatedModule] = field(default_factory=list)
    """In the order in which the modules ran."""

    calls: list[GateCall] = field(default_factory=list)

    def row(self, index: int) -> tuple[list[int], np.ndarray]:
        """Join all forward passes of one row of the batch, without padding.

        Args:
            index: The row of the batch.

        Returns:
            The token ids of the row, and their gates as an array (modules, tokens).

        Raises:
            ValueError: A forward was run from embeddings, which have no token ids, or a forward pass does not
                continue the one before it, so that a row has several texts.
        """
        ids: list[int] = []
        gates = []
        read = self.calls[0].cached if self.calls else 0
        for number, call in enumerate(self.calls):
            _, batch, tokens = call.gates.shape
            start = call.cached + call.repeated
            if start != read or batch != self.calls[0].gates.shape[1]:
                raise ValueError(
                    f"row {index}: forward pass {number} does not continue forward pass {number - 1}, so the "
                    "row has several texts; use columns(), or one capture_gates for each text"
                )
            read = call.cached + tokens
            if call.input_ids is None:
                raise ValueError("the token ids are unknown: a forward was run from embeddings")
            new = call.non_padding[index].clone()
            new[: call.repeated] = False
            ids += call.input_ids[index][new].tolist()
            gates.append(call.gates[:, index, new])
        return ids, torch.cat(gates, 1).numpy()

    def columns(self) -> dict[str, np.ndarray]:
        """Return a table with one line for each module and non-padding token.

        A token that ``generate`` without a cache reads in every step is listed once, with the first step.
        Forward passes outside ``generate`` that do not use a cache are texts of their own.

        Returns:
            Columns for ``pandas.DataFrame`` or ``datasets.Dataset.from_dict``: ``call`` (index of the forward
            pass), ``phase``, ``row``, ``position``, ``token_id`` (−1 if unknown), ``layer``, ``module``
            (projection type) and ``gate``.
        """
        parts: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        layers = np.array([module.layer for module in self.modules])
        projections = np.array([module.projection for module in self.modules])
        for number, call in enumerate(self.calls):
            new = call.non_padding[:, call.repeated :].nonzero(as_tuple=True)  # rows (n,), tokens (n,)
            rows, tokens = new[0].numpy(), new[1].numpy() + call.repeated
            ids = np.full(len(rows), -1) if call.input_ids is None else call.input_ids.numpy()[rows, tokens]
            modules, count = len(self.modules), len(rows)
            per_token = {"row": rows, "position": call.positions.numpy()[rows, tokens], "token_id": ids}
            parts["call"].append(np.full(modules * count, number))
            parts["phase"].append(np.full(modules * count, call.phase))
            for name, values in per_token.items():
                parts[name].append(np.tile(values, modules))
            parts["layer"].append(np.repeat(layers, count))
            parts["module"].append(np.repeat(projections, count))
            parts["gate"].append(call.gates.numpy()[:, rows, tokens].ravel())
        return {name: np.concatenate(values) if values else np.array([]) for name, values in parts.items()}


@checks_arguments
@contextmanager
def capture_gates(model: nn.Module) -> Iterator[GateCapture]:
    """Capture the gates of every forward pass inside the ``with`` block, ``generate`` included.

    Gates are copied to the CPU after each forward pass. A model without gates yields an empty capture. What
    ``generate`` reads after the end of a text, while others in the batch continue, counts as padding.

    Args:
        model: An adapted Transformers model.

    Yields:
        The capture, which grows with every forward pass.

    Raises:
        RuntimeError: Another recording of the model's gates is active.
        ValueError: A layer saw other tokens than those of the batch (for example in a mixture of experts), or
            the rows of the batch do not keep their texts, as in beam search.

    Example:
        >>> with capture_gates(model) as captured:
        ...     model.generate(**inputs, max_new_tokens=40)
        >>> table = pandas.DataFrame(captured.columns())
    """
    captured, rows = GateCapture(), RowTracker()

    def store(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = (ids if ids is not None else kwargs["inputs_embeds"][..., 0]).shape  # (batch, tokens)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # of each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values())))
        cached = _cached_tokens(kwargs.get("past_key_values"), mask, shape[1])
        rows.check_rows(getattr(output, "past_key_values", None), shape[1], continues=cached > 0)
        repeated = rows.repeated_tokens(ids) if cached == 0 else 0
        mask = _tokens_of_texts(mask, shape[0], cached + shape[1])
        z = record.stacked(torch.ones(shape))
        if z is not None:
            captured.modules = [GatedModule(name) for name in record.names]
            captured.calls.append(
                GateCall(
                    phase="decoding" if cached + repeated > 0 else "prefill",
                    input_ids=None if ids is None else ids.detach().cpu(),
                    non_padding=mask[:, -shape[1] :].bool() & rows.unfinished(shape[0]).unsqueeze(1),
                    positions=(mask.cumsum(1) - 1)[:, -shape[1] :].clamp_(min=0),
                    gates=torch.sigmoid(z.detach().float()).cpu(),
                    cached=cached,
                    repeated=repeated,
                )
            )
        record.clear()

    def forget(*_: Any) -> None:
        """Drop the gates of a module inside the model that ran alone, and of a forward pass that failed."""
        record.clear()

    with record_gates(model) as record, tracked_generation(model, rows):
        handles = (
            model.register_forward_pre_hook(forget, prepend=True),
            model.register_forward_hook(store, with_kwargs=True),
        )
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def _cached_tokens(cache: Any, mask: Tensor | None, tokens: int) -> int:
    """The number of tokens that precede a forward of ``tokens``, by its cache or else by its mask."""
    try:
        # After the forward, the cache also holds the keys of the forward's own tokens.
        return max(0, int(cache.get_seq_length()) - tokens)
    except (AttributeError, NotImplementedError, ValueError):
        # There is no cache, or it holds a recurrent state and does not count tokens.
        return 0 if mask is None or mask.ndim != 2 else mask.shape[1] - tokens


def _tokens_of_texts(mask: Tensor | None, rows: int, tokens: int) -> Tensor:
    """Return a mask (rows, tokens) of the tokens that are not padding, from a mask of any kind."""
    if mask is None or mask.ndim not in (2, 4):
        return torch.ones(rows, tokens, dtype=torch.long)
    if mask.ndim == 4:  # (rows, 1, queries, keys), from generate with a static cache: nobody reads padding
        may_read = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = may_read[:, 0].any(1)[:, :tokens]
    return mask.cpu().long()
