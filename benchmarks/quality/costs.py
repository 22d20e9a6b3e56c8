"""What the methods cost, from what two other benchmarks wrote: interleaved timings, bytes and FLOPs.

    python -m benchmarks.train_step --dtype float32 --rank 16 --rounds 4 \\
        --only lora dora hira gatera hard_half_open gated_lora ts_peft abba \\
        --out benchmarks/quality/costs/train_step.json
    python -m benchmarks.decoding --dtype float32 --rounds 3 --new-tokens 16 \\
        --only backbone lora hira gatera gatera_fast hard hard_fast ts_peft ts_peft_fast abba \\
        --out benchmarks/quality/costs/decoding.json
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.interleaving import format_ratio
from benchmarks.quality.ledger import Line
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import FamilyResults
from benchmarks.quality.tables import markdown_table

TIMINGS = Path(__file__).parent / "costs"

PARAMETERS_SCALE, TFLOPS_SCALE, GIGABYTES_SCALE = 5e8, 10.0, 94.0
"""Where a cost halves the score of PEFT-Bench (arXiv 2511.21285)."""


@dataclass(frozen=True)
class Contenders:
    """Which contenders of the other benchmarks run a method."""

    step: str | None = None
    """Of ``benchmarks.train_step``."""

    decoding: Sequence[str] = ()
    """Of ``benchmarks.decoding``: exact, then with one weight per token."""

    can_be_merged: bool = True
    """Whether a merged adapter decodes at the backbone's speed."""


CONTENDERS = {
    "lora": Contenders("lora", ("lora",)),
    "dora": Contenders("dora", ("dora",)),
    "hira": Contenders("hira", ("hira",)),
    "abba": Contenders("abba", ("abba",)),
    "hira_static": Contenders("hira_static", ("hira_static",)),
    "gatera": Contenders("gatera", ("gatera", "gatera_fast"), can_be_merged=False),
    "hard_hira": Contenders("hard_half_open", ("hard", "hard_fast"), can_be_merged=False),
    "gated_lora": Contenders("gated_lora", ("gated_lora", "gated_lora_fast"), can_be_merged=False),
    "ts_peft": Contenders("ts_peft", ("ts_peft", "ts_peft_fast"), can_be_merged=False),
}
"""By method of the comparison."""


@dataclass(frozen=True)
class Timings:
    """What both benchmarks wrote."""

    step: Mapping[str, Any]
    """Results of ``benchmarks.train_step`` by contender."""

    counted: Mapping[str, Any]
    """Bytes and FLOPs of a training step by contender."""

    decoding: Mapping[str, Any]
    """Results of ``benchmarks.decoding`` by contender."""

    @classmethod
    def read(cls, folder: Path = TIMINGS) -> "Timings":
        """Read both files; a missing one has no results."""
        step, decoding = (
            json.loads(path.read_text()) if path.is_file() else {"results": {}, "settings": {"counted": {}}}
            for path in (folder / "train_step.json", folder / "decoding.json")
        )
        return cls(step["results"], step["settings"]["counted"], decoding["results"])

    def peak_bytes(self, method: str) -> float | None:
        """Return the peak of the allocated memory in a training step; None if not counted."""
        counted = self.counted.get(CONTENDERS[method].step or "")
        return None if counted is None else float(counted["allocated_bytes"])

    def step_ratio(self, method: str) -> str:
        """Return the CPU seconds of a step, divided by LoRA's of the same round; empty if not measured."""
        name = CONTENDERS[method].step
        if name not in self.step or "lora" not in self.step:
            return ""
        return format_ratio(self.step[name]["cpu"], self.step["lora"]["cpu"])

    def decoding_ratios(self, method: str) -> list[str]:
        """Return the tokens per second of each way to decode, divided by the backbone's."""
        names = [name for name in CONTENDERS[method].decoding if name in self.decoding]
        if "backbone" not in self.decoding:
            return []
        return [format_ratio(self._token_seconds("backbone"), self._token_seconds(name)) for name in names]

    def extra_tflops(self, method: str) -> float | None:
        """Return what decoding a prompt takes more than with the backbone alone; 0 if it can be merged."""
        contenders = CONTENDERS[method]
        if contenders.can_be_merged:
            return 0.0
        backbone, own = (self._prompt_flops(name) for name in ("backbone", contenders.decoding[0]))
        return None if backbone is None or own is None else (own - backbone) / 1e12

    def _prompt_flops(self, name: str) -> float | None:
        return float(self.decoding[name]["figures"][0]["prompt_flops"]) if name in self.decoding else None

    def _token_seconds(self, name: str) -> list[float]:
        return [figures["token_s"] for figures in self.decoding[name]["figures"]]


def pscp(performance: float, parameters: int, extra_tflops: float, peak_bytes: float) -> float:
    """Return the PEFT Soft Cost Penalties score, ``P · Π (1 + M/C)⁻¹`` over three costs (PEFT-Bench).

    Args:
        performance: P, an accuracy.
        parameters: Trained parameters.
        extra_tflops: FLOPs of inference that the backbone alone does not need, in 10¹².
        peak_bytes: Peak memory in training.
    """
    costs = (
        (parameters, PARAMETERS_SCALE),
        (extra_tflops, TFLOPS_SCALE),
        (peak_bytes / 1e9, GIGABYTES_SCALE),
    )
    for cost, scale in costs:
        performance /= 1 + cost / scale
    return performance


def cost_table(lines: Sequence[Line], timings: Timings) -> str:
    """Draw what each method costs, with its score on commonsense; empty cells are not measured."""
    results = FamilyResults("commonsense", lines)
    rows = []
    for name, contenders in CONTENDERS.items():
        cost = [line["cost"] for line in results.level_runs.get(name, {}).values()]
        extra, peak = timings.extra_tflops(name), timings.peak_bytes(name)
        sizes, score = ["", ""], ""
        if cost:
            parameters = cost[0]["trained_parameters"]
            sizes = [f"{parameters / 1e6:.2f}", f"{cost[0]['adapter_bytes'] / 1e6:.1f}"]
            if extra is not None and peak is not None:
                (accuracy,) = results.values(name, "accuracy")
                score = f"{pscp(accuracy.mean, parameters, extra, peak):.3f}"
        exact, fast = [*timings.decoding_ratios(name), "", ""][:2]
        memory = "" if peak is None else f"{peak / 1e6:.0f}"
        merged = "1" if contenders.can_be_merged else "cannot be merged"
        step = timings.step_ratio(name)
        rows.append([METHODS[name].title, *sizes, memory, step, exact, fast, merged, score])
    header = ["method", "million parameters", "MB on disk", "peak MB", "step ÷ LoRA", "tokens/s ÷ backbone"]
    return markdown_table([*header, "one weight per token", "merged", "PSCP"], rows)
