"""The gate report: readings of one adapter or two as JSON, as a page of HTML without a network, or as a picture."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gatera_lightning.gate_analysis.probing import GateReading
from gatera_lightning.gate_analysis.statistics import CLOSED, OPEN, PHASES, statistics_of
from gatera_lightning.gate_analysis.token_labels import token_texts

FORMAT_VERSION = 1
_EXTREMES = 12
_CONTEXT = 6  # tokens on either side


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter's reading, and where it comes from."""

    source: dict[str, str]
    reading: GateReading


def report(
    adapters: Sequence[ReadAdapter], tokenizer: PreTrainedTokenizerBase, computed_from: dict[str, str]
) -> dict[str, Any]:
    """Everything the page shows, as what ``json`` can write; readings share their texts.

    ``gates[adapter][text]`` is (modules, tokens); statistics are of all texts together.
    """
    texts = adapters[0].reading.texts
    labels = [token_texts(tokenizer, text.ids) for text in texts]
    return {
        "format_version": FORMAT_VERSION,
        "computed_from": computed_from,
        "closed_below": CLOSED,
        "open_from": OPEN,
        "texts": [
            {
                "title": text.title,
                "tokens": label,
                "ids": text.ids,
                "prompt": text.prompt,
                "decoded": text.decoded,
            }
            for text, label in zip(texts, labels, strict=True)
        ],
        "adapters": [
            {
                "source": adapter.source,
                "modules": [
                    {"path": module.path, "layer": module.layer, "name": module.name}
                    for module in adapter.reading.modules
                ],
                "gates": [
                    [[round(float(g), 7) for g in module] for module in gates]
                    for gates in adapter.reading.gates
                ],
                "phases": list(adapter.reading.phases),
                "statistics": _statistics(adapter.reading),
                "extremes": _extremes(adapter.reading, labels),
            }
            for adapter in adapters
        ],
    }


def _statistics(reading: GateReading) -> dict[str, Any]:
    """By phase: of everything, of every layer in every module family, and of the first tokens' positions."""
    found: dict[str, Any] = {}
    families = list(dict.fromkeys(module.name for module in reading.modules))
    layers = sorted({module.layer for module in reading.modules})
    for phase in dict.fromkeys((*PHASES, *reading.phases)):  # response is every response, read or generated
        gates = reading.of(phase)
        found[phase] = statistics_of(gates) | {"layers": layers}
        found[phase]["mean_by_layer"] = {
            family: [
                _mean(gates[[m.name == family and m.layer == layer for m in reading.modules]])
                for layer in layers
            ]
            for family in families
        }
    # Columns of a position: tokens of all texts that reach so far.
    means = [gates.mean(0, dtype=float) for gates in reading.gates]  # (tokens,) each
    longest = max(map(len, means))
    found["mean_by_position"] = [_mean(np.array([m[p] for m in means if p < len(m)])) for p in range(longest)]
    return found


def _mean(gates: np.ndarray) -> float | None:
    return float(gates.mean(dtype=float)) if gates.size else None


def _extremes(reading: GateReading, labels: list[list[str]]) -> dict[str, list[dict[str, Any]]]:
    """The tokens whose mean gate over all modules is lowest and highest, between their neighbours."""
    means = [
        (float(mean), text, p)
        for text, g in enumerate(reading.gates)
        for p, mean in enumerate(g.mean(0, dtype=float))
    ]
    means.sort()

    def entry(mean: float, text: int, position: int) -> dict[str, Any]:
        tokens = labels[text]
        return {
            "mean": round(mean, 7),
            "text": text,
            "position": position,
            "before": "".join(tokens[max(0, position - _CONTEXT) : position]),
            "token": tokens[position],
            "after": "".join(tokens[position + 1 : position + 1 + _CONTEXT]),
        }

    return {
        "closed": [entry(*found) for found in means[:_EXTREMES]],
        "open": [entry(*found) for found in reversed(means[-_EXTREMES:])],
    }


def page(found: dict[str, Any]) -> str:
    """One self-contained page. Texts reach it as data and are shown as text: nothing in them is read as HTML or script."""
    template = (
        resources.files("gatera_lightning.gate_analysis")
        .joinpath("report_page.html")
        .read_text(encoding="utf-8")
    )
    data = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return template.replace("{{report}}", data)
