"""Merge an adapter into its backbone: a plain Hugging Face folder, with what the merge changed in figures."""

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gatera_lightning.adapters.gate_recording import record_gates
from gatera_lightning.adapters.gates import StaticGate
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.lookup import adapted_linears, has_token_gates
from gatera_lightning.adapters.merging import exact_merged_weight, merge_adapter
from gatera_lightning.datamodules.sources.files import read_rows
from gatera_lightning.datamodules.sources.spec import ROW_SUFFIXES, Source, data_suffix, expand_path
from gatera_lightning.datamodules.sources.text_files import read_text
from gatera_lightning.errors import AdapterFileError, ConfigError, printable

_PROBE = "The quick brown fox jumps over the lazy dog. What is 17 + 25? The answer is 42."
_TOLERANCE = 1e-3
"""How far logits may differ in float32, as a share of the largest logit."""


@dataclass(frozen=True)
class MergeReport:
    """What merging changed."""

    logit_difference: float
    """Largest difference between the logits of the merged folder and those of the adapted model."""

    lost_updates: float
    """Share of the changed elements that the dtype rounds back to the frozen weight."""

    rounding: float
    """Norm of the rounding error as a share of the norm of the update."""

    loss: float | None = None
    """Loss of the gated model on the rows, nats per token; None if no gate became a constant."""

    merged_loss: float | None = None
    """Loss of the merged model on the rows, nats per token."""

    divergence: float | None = None
    """KL divergence from the gated model's predictions to the merged model's, nats per token."""

    def lines(self) -> list[str]:
        """Return the report as sentences."""
        found = [
            f"largest difference of a logit to the adapted model: {self.logit_difference:.3g}",
            f"updates lost to the dtype: {self.lost_updates:.2%} of the changed weights; "
            f"rounding error: {self.rounding:.2%} of the update's norm",
        ]
        if self.loss is not None and self.merged_loss is not None and self.divergence is not None:
            found.append(
                f"constant gates: loss {self.loss:.4f} -> {self.merged_loss:.4f} nats per token, KL "
                f"divergence {self.divergence:.3g} nats per token, on the given rows"
            )
        return found


def read_texts(source: str) -> list[str]:
    """Read texts as data modules read their sources: the field ``text`` of rows, or the lines of a text file.

    Args:
        source: Path or URL of a table or a text file, compressed or not; ``[start:stop]`` may follow. A file
            whose name has no ending of a table is a text file.

    Raises:
        ConfigError: The file cannot be read, a row has no text, or no text is selected.
    """
    parsed = Source.parse(source)
    try:
        texts = _texts_at(expand_path(parsed.location))
        parsed.check_size(len(texts), "texts")
    except ValueError as error:  # a ConfigError, or a slice that selects nothing
        raise ConfigError(f"--rows: {error}") from error
    return texts[parsed.rows]


def _texts_at(location: str) -> list[str]:
    if data_suffix(location) not in ROW_SUFFIXES:  # any other name is that of a text file
        return [line for line in read_text(location).splitlines() if line.strip()]
    return [_text_of(row, where) for where, row in read_rows(location)]


def _text_of(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str) or not text.strip():
        names = f"the fields {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"{row!r:.60}"
        found = f"field 'text': {text!r:.60}" if isinstance(row, Mapping) and "text" in row else names
        raise ConfigError(printable(f"{where}: {found}; accepted: a row with a field text that is not empty"))
    return text


@torch.no_grad()
def write_merged_model(
    model: PreTrainedModel, tokenizer: Any, folder: Path, texts: Sequence[str] | None
) -> MergeReport:
    """Merge an adapted model, write it with its tokenizer, and compare the folder's logits.

    Args:
        model: The adapted model, which is merged in place.
        tokenizer: Its tokenizer.
        folder: The folder to write, which must not exist.
        texts: Rows on which token gates are averaged and the difference is measured; needed for a token gate.

    Returns:
        What the merge changed.

    Raises:
        AdapterFileError: If the folder's logits differ; nothing is written then.
    """
    model.eval()
    rows = [_ids(tokenizer, text, model) for text in texts or [_PROBE]]
    gated = None
    if has_token_gates(model):
        gated = [_logits(model, ids) for ids in rows]
        _make_gates_constant(model, rows)
    expected = [_logits(model, ids) for ids in rows]
    lost, rounding = _rounding(list(adapted_linears(model).values()))
    merge_adapter(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as temporary:
        target = Path(temporary) / folder.name
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        written = AutoModelForCausalLM.from_pretrained(target, dtype=model.dtype).eval()
        found = [_logits(written, ids) for ids in rows]
        difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        largest = max(float(logits.abs().max()) for logits in expected)
        if model.dtype == torch.float32 and not difference <= _TOLERANCE * largest:
            raise AdapterFileError(
                f"{folder}: not written, because the merged model's logits differ from the adapted model's "
                f"by {difference:.3g}"
            )
        target.rename(folder)
    if gated is None:
        return MergeReport(difference, lost, rounding)
    tokens = sum(ids.shape[1] for ids in rows)
    divergence = sum(
        float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in zip(gated, found, strict=True)
    )
    return MergeReport(
        difference, lost, rounding, _loss(gated, rows), _loss(found, rows), divergence / tokens
    )


def _ids(tokenizer: Any, text: str, model: PreTrainedModel) -> Tensor:
    """Return the token ids of a text, (1, tokens), at least two and at most the context."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    limit = getattr(model.config, "max_position_embeddings", None) or ids.shape[1]
    return ids[:, :limit].to(model.device)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].float()  # (tokens, vocabulary)


def _loss(logits: Sequence[Tensor], rows: Sequence[Tensor]) -> float:
    """Return the cross-entropy of the next token over all rows, nats per token."""
    total = sum(
        float(F.cross_entropy(z[:-1], ids[0, 1:], reduction="sum"))
        for z, ids in zip(logits, rows, strict=True)
    )
    return total / max(1, sum(ids.shape[1] - 1 for ids in rows))


def _make_gates_constant(model: PreTrainedModel, rows: Sequence[Tensor]) -> None:
    """Replace every token gate by its mean over the tokens of the rows, as evaluation applies it.

    A gate that decides is 0 or 1 there, so its mean is the share of tokens that keep their update.
    """
    sums: dict[str, float] = defaultdict(float)
    layers = adapted_linears(model)
    for ids in rows:
        with record_gates(model) as gates:
            model(input_ids=ids, use_cache=False)
        for name, logit in zip(gates.names, gates.logits, strict=True):
            gate = layers[name].gate
            assert gate is not None  # it was recorded
            sums[name] += float(gate.values(logit).values.sum())
    tokens = sum(ids.numel() for ids in rows)
    for name, layer in layers.items():
        if layer.gate is not None and layer.gate.depends_on_token:
            mean = min(max(sums[name] / tokens, 1e-9), 1 - 1e-9)
            parameter = next(layer.gate.parameters())
            bias = math.log(mean / (1 - mean))
            layer.gate = StaticGate(bias=bias, dtype=parameter.dtype, device=parameter.device)


def _rounding(layers: Sequence[AdaptedLinear]) -> tuple[float, float]:
    """Return the share of changed elements that rounding undoes, and the error's share of the update."""
    changed = undone = 0
    error = size = 0.0
    for layer in layers:
        weight, exact = layer.base.weight, exact_merged_weight(layer)
        rounded = exact.to(weight.dtype)
        moved = exact != weight.to(exact.dtype)
        changed += int(moved.sum())
        undone += int((moved & (rounded == weight)).sum())
        error += float((rounded.to(exact.dtype) - exact).square().sum())
        size += float((exact - weight.to(exact.dtype)).square().sum())
    return undone / max(1, changed), math.sqrt(error / size) if size else 0.0
