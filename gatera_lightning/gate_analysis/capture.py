"""Gate values of any adapted model, tidy: one number a module and token, during ``generate`` too; no Lightning needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gate_recording import record_gates

Phase = Literal["prefill", "decoding"]


@dataclass(frozen=True)
class GatedModule:
    """Where a gate is: ``model.layers.3.self_attn.q_proj`` is layer 3, module ``q_proj``."""

    path: str

    @property
    def layer(self) -> int:
        """The number of the decoder layer, −1 where the path has none."""
        return next((int(part) for part in self.path.split(".") if part.isdecimal()), -1)

    @property
    def name(self) -> str:
        """The module within its layer."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class GateCall:
    """One forward: everything by row and token of its input."""

    phase: Phase
    """``decoding`` when the forward went on from cached keys."""

    input_ids: Tensor | None
    """(rows, tokens), or None for a forward from embeddings."""

    real: Tensor
    """(rows, tokens): whether the token is none of the padding."""

    positions: Tensor
    """(rows, tokens): the place of a token among the row's real ones, from 0."""

    gates: Tensor
    """(modules, rows, tokens), ``g = σ(z)`` in fp32."""


@dataclass
class GateCapture:
    """The gates of every forward inside :func:`capture_gates`, on the CPU."""

    modules: list[GatedModule] = field(default_factory=list)
    """In the order in which they ran."""

    calls: list[GateCall] = field(default_factory=list)

    def row(self, row: int) -> tuple[list[int], np.ndarray]:
        """Token ids of one row over all calls, padding left out, and their gates (modules, tokens).

        Raises ValueError after a forward from embeddings, which has no token ids.
        """
        ids: list[int] = []
        gates = []
        for call in self.calls:
            if call.input_ids is None:
                raise ValueError("a forward was made from embeddings: its tokens are unknown")
            ids += call.input_ids[row][call.real[row]].tolist()
            gates.append(call.gates[:, row, call.real[row]])
        return ids, torch.cat(gates, 1).numpy()

    def columns(self) -> dict[str, np.ndarray]:
        """A table as ``pandas.DataFrame`` and ``datasets.Dataset.from_dict`` take it, a line for each module and real token.

        ``call`` (number of the forward), ``phase``, ``row``, ``position``, ``token_id`` (−1 where unknown), ``layer``,
        ``module`` and ``gate``.
        """
        parts: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
        layers = np.array([module.layer for module in self.modules])
        names = np.array([module.name for module in self.modules])
        for number, call in enumerate(self.calls):
            rows, tokens = (index.numpy() for index in call.real.nonzero(as_tuple=True))  # (n,) each
            ids = np.full(len(rows), -1) if call.input_ids is None else call.input_ids.numpy()[rows, tokens]
            modules, count = len(self.modules), len(rows)
            of_token = {"row": rows, "position": call.positions.numpy()[rows, tokens], "token_id": ids}
            parts["call"].append(np.full(modules * count, number))
            parts["phase"].append(np.full(modules * count, call.phase))
            for name, values in of_token.items():
                parts[name].append(np.tile(values, modules))
            parts["layer"].append(np.repeat(layers, count))
            parts["module"].append(np.repeat(names, count))
            parts["gate"].append(call.gates.numpy()[:, rows, tokens].ravel())
        return {name: np.concatenate(values) if values else np.array([]) for name, values in parts.items()}


def _tokens_before(cache: Any, mask: Tensor | None, tokens: int) -> int:
    """How many tokens a forward of ``tokens`` went on from: by its cache, which holds its own now, or by its mask."""
    try:
        return max(0, int(cache.get_seq_length()) - tokens)
    except (
        AttributeError,
        NotImplementedError,
        ValueError,
    ):  # no cache, or one that keeps a state and counts nothing
        return 0 if mask is None or mask.ndim != 2 else mask.shape[1] - tokens


_COLUMNS = ("call", "phase", "row", "position", "token_id", "layer", "module", "gate")


@contextmanager
def capture_gates(model: nn.Module) -> Iterator[GateCapture]:
    """Keep the gates of every forward of a Transformers model inside the ``with`` block, ``generate`` included.

    Values are copied to the CPU after each forward. A model without gates leaves an empty capture. Raises RuntimeError when
    gates are being recorded already, and ValueError where a layer saw other tokens than the batch's.
    """
    captured = GateCapture()

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = (ids if ids is not None else kwargs["inputs_embeds"][..., 0]).shape  # (rows, tokens)
        mask = kwargs.get("attention_mask")
        before = _tokens_before(kwargs.get("past_key_values"), mask, shape[1])
        if mask is None or mask.ndim != 2:
            mask = torch.ones(shape[0], before + shape[1], dtype=torch.long)
        mask = mask.cpu().long()
        z = record.stacked(torch.ones(shape))
        if z is not None:
            captured.modules = [GatedModule(name) for name in record.names]
            captured.calls.append(
                GateCall(
                    phase="decoding" if before > 0 else "prefill",
                    input_ids=None if ids is None else ids.detach().cpu(),
                    real=mask[:, -shape[1] :].bool(),
                    positions=(mask.cumsum(1) - 1)[:, -shape[1] :].clamp_(min=0),
                    gates=torch.sigmoid(z.detach().float()).cpu(),
                )
            )
        record.names.clear()
        record.logits.clear()

    with record_gates(model) as record:
        handle = model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield captured
        finally:
            handle.remove()
