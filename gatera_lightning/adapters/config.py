"""What to adapt and how: two independent choices, the update ``u`` and the gate ``g``, make a method."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

UpdateName = Literal["lora", "dora", "hira"]
GateName = Literal["none", "static", "token"]
AdapterDtype = Literal["float32", "float64"]


@dataclass
class AdapterConfig:
    """An adapted layer computes ``y = W0 x + b + g(x) · u(x)``; the defaults are GateRA's (AAAI 2026, arXiv 2511.17582)."""

    update: UpdateName = "hira"
    """The update u(x): lora = (alpha/rank)·B A x, dora = magnitude and direction, hira = (W0 ⊙ BA) x."""

    gate: GateName = "token"
    """The gate g: none = 1, static = one learned scalar per layer, token = sigmoid(w·x + b) for every token."""

    rank: int = 32
    """Rank r of B A; at most the smaller side of every adapted weight."""

    alpha: float | None = None
    """Scale alpha/rank of lora and dora; null means alpha = rank. An error with hira, which has no scale."""

    dropout: float = 0.0
    """Dropout probability on the update's input; the frozen path and the gate see the undropped input."""

    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    )
    """Linear layers to adapt: the last segment of a module's name, or a regular expression for its whole name."""

    layers: list[int] | None = None
    """Indices of the decoder layers to adapt; null adapts all of them."""

    gate_bias: float = 0.0
    """Initial gate logit b: 0 starts every gate half open (g = 0.5), -2 nearly closed (g = 0.12)."""

    skip_below: float = 0.0
    """In training, tokens with a gate below this take the frozen path alone: 2 large products in place of 5; 0 skips none."""

    merge_above: float = 1.0
    """In training, tokens with a gate above this take the merged weight: 3 large products in place of 5; 1 merges none.
    The merged weight has the backbone's dtype: in bfloat16, changes below about 0.4 % of a weight are lost to open tokens."""

    adapter_dtype: AdapterDtype = "float32"
    """Dtype of the trainable master weights; the backbone keeps its own."""

    def problems(self) -> list[str]:
        """Everything about these values that cannot work, whatever the model; empty when all is well."""
        found = []
        for name, accepted in (("update", UpdateName), ("gate", GateName), ("adapter_dtype", AdapterDtype)):
            value, choices = getattr(self, name), get_args(accepted)
            if value not in choices:
                found.append(f"adapter.{name}: {value!r} is unknown; accepted: {', '.join(choices)}")
        if not _is_int(self.rank) or self.rank < 1:
            found.append(f"adapter.rank: {self.rank!r} is not a rank; accepted: an integer of at least 1")
        if self.update == "hira" and self.alpha is not None:
            found.append(
                f"adapter.alpha: {self.alpha!r}, but update 'hira' has no scale; accepted: null, or update lora or dora"
            )
        elif self.alpha is not None and not (_is_finite(self.alpha) and self.alpha > 0):
            found.append(
                f"adapter.alpha: {self.alpha!r}; accepted: a number above 0, or null for alpha = rank"
            )
        if not (_is_finite(self.dropout) and 0 <= self.dropout < 1):
            found.append(
                f"adapter.dropout: {self.dropout!r}; accepted: a probability of at least 0 and below 1"
            )
        if not _is_finite(self.gate_bias):
            found.append(f"adapter.gate_bias: {self.gate_bias!r}; accepted: a finite number")
        of_thresholds = threshold_problems(self.skip_below, self.merge_above)
        found += [f"adapter.{problem}" for problem in of_thresholds]
        if (
            not of_thresholds
            and self.tells_tokens_apart
            and (self.update, self.gate, self.dropout) != ("hira", "token", 0.0)
        ):
            found.append(
                f"adapter.skip_below: {self.skip_below!r}, merge_above: {self.merge_above!r}, with update {self.update!r}, "
                f"gate {self.gate!r}, dropout {self.dropout!r}; accepted: 0 and 1, or update 'hira', gate 'token' and dropout 0"
            )
        if not isinstance(self.target_modules, list) or not self.target_modules:
            found.append(
                f"adapter.target_modules: {self.target_modules!r}; accepted: a list of at least one name or regex"
            )
        else:
            found += [
                f"adapter.target_modules: {text}" for text in map(_regex_problem, self.target_modules) if text
            ]
        if self.layers is not None and not (
            isinstance(self.layers, list) and self.layers and all(_is_int(i) and i >= 0 for i in self.layers)
        ):
            found.append(
                f"adapter.layers: {self.layers!r}; accepted: null for all, or a list of indices from 0 on"
            )
        return found

    @property
    def tells_tokens_apart(self) -> bool:
        """Whether training leaves out products of tokens whose gates are decided."""
        return (self.skip_below, self.merge_above) != (0.0, 1.0)

    @property
    def scale(self) -> float:
        """``alpha / rank`` of lora and dora; 1 when alpha is not set."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


def threshold_problems(skip_below: Any, merge_above: Any) -> list[str]:
    """What is wrong with the gates from which a token counts as closed and as open; without the section's name."""
    found = []
    if not (_is_finite(skip_below) and 0 <= skip_below <= 0.5):
        found.append(f"skip_below: {skip_below!r}; accepted: a gate from 0 (skips none) up to 0.5")
    if not (_is_finite(merge_above) and 0.5 <= merge_above <= 1):
        found.append(f"merge_above: {merge_above!r}; accepted: a gate from 0.5 up to 1 (merges none)")
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _regex_problem(pattern: Any) -> str | None:
    if not isinstance(pattern, str):
        return f"{pattern!r} is no text"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is no regular expression ({error})"
    return None
