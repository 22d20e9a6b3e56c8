"""The methods that are compared, and the learning rates that each of them tries first."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.controls import RandomGateConfig, ShuffledTokenGateConfig
from benchmarks.quality.families import FAMILIES
from gatera_lightning import (
    AdapterConfig,
    GateConfig,
    HardGateConfig,
    NoGateConfig,
    StaticGateConfig,
    ThresholdGateConfig,
    TokenGateConfig,
)
from gatera_lightning.backbone.config import Dtype

RANK = 16

SEEDS = (1, 2, 3)
"""Seeds of the tested runs; none of them chose a rate."""

MORE_SEEDS = (*SEEDS, 4, 5)
"""Seeds of the methods on which the claims about choosing tokens and about forgetting rest."""

STEPS = 32
"""Optimizer steps of a run."""

LOW_RATE_GRID = (2e-3, 4e-3, 8e-3)
"""For methods that add a low-rank product."""

HADAMARD_RATE_GRID = (8e-3, 1.6e-2, 3.2e-2)
"""For HiRA, which multiplies W0 elementwise, and ABBA: they need several times LoRA's rate."""

RATE_FACTOR = 2.0
"""Ratio of two neighboring rates."""


@dataclass(frozen=True)
class Method:
    """An update with a gate, and how it is trained."""

    name: str

    title: str
    """Name in tables."""

    update: str

    gate: GateConfig = field(default_factory=NoGateConfig)

    rates: tuple[float, ...] = ()
    """Learning rates to try first; more follow while the best one is the first or the last."""

    rate_of: str = ""
    """For a control: the method whose learning rate it takes over, in place of ``rates``."""

    steps: int = STEPS
    """Optimizer steps."""

    dtype: Dtype = "float32"
    """Of the backbone."""

    stochastic_rounding: bool = False

    families: tuple[str, ...] = tuple(FAMILIES)
    """The families that it runs on; one is enough to compare two ways to compute."""

    seeds: tuple[int, ...] = SEEDS
    """Seeds of its tested runs."""

    def adapter(self) -> AdapterConfig:
        """Return the settings of its adapter."""
        rounding = self.stochastic_rounding
        return AdapterConfig(update=self.update, gate=self.gate, rank=RANK, stochastic_rounding=rounding)

    def config(self) -> dict[str, Any]:
        """Return what a ledger's line says about the method."""
        settings = self.adapter().to_dict()
        chosen = {name: settings[name] for name in ("update", "rank", "gate", "target_modules")}
        if self.dtype != "float32":
            chosen |= {"dtype": self.dtype, "stochastic_rounding": self.stochastic_rounding}
        return chosen | {"steps": self.steps}


SATURATING = {"lr_multiplier": 10.0, "entropy_weight": 0.1}
"""Settings that saturate gates within a run, as in the overlay fast_saturated.yaml."""

LORA_STEPS_OF_EQUAL_TIME = 56
"""A dense GateRA step takes 1.75 times the CPU seconds of LoRA's (2.9 and 1.65 s for 288 tokens)."""

STATIC_BIAS_OF_EQUAL_MEAN, RANDOM_BIAS_OF_EQUAL_MEAN = 0.85, 1.0
"""Initial logits with a mean gate of 0.70, about GateRA's on commonsense and math."""

STATIC_BIAS_ON_DIALOGUE, RANDOM_BIAS_ON_DIALOGUE = -0.75, -0.88
"""Initial logits with a mean gate of 0.32, about GateRA's on dialogue."""

METHODS = {
    method.name: method
    for method in (
        Method("lora", "LoRA", "lora", rates=LOW_RATE_GRID, seeds=MORE_SEEDS),
        Method("hira", "HiRA", "hira", rates=HADAMARD_RATE_GRID, seeds=MORE_SEEDS),
        Method("gatera", "GateRA", "hira", TokenGateConfig(), rates=HADAMARD_RATE_GRID, seeds=MORE_SEEDS),
        Method(
            "hira_static",
            "HiRA, static gate",
            "hira",
            StaticGateConfig(),
            rates=HADAMARD_RATE_GRID,
            seeds=MORE_SEEDS,
        ),
        Method(
            "hard_hira",
            "HiRA, hard gate",
            "hira",
            HardGateConfig(gradient_share=0.125),
            rates=HADAMARD_RATE_GRID,
        ),
        Method("ts_peft", "TS-PEFT over LoRA", "lora", ThresholdGateConfig(), rates=LOW_RATE_GRID),
        Method("abba", "ABBA", "abba", rates=HADAMARD_RATE_GRID),
        Method(
            "gatera_shuffled",
            "GateRA, tokens shuffled",
            "hira",
            ShuffledTokenGateConfig(),
            rate_of="gatera",
            seeds=MORE_SEEDS,
        ),
        Method(
            "gatera_random",
            "GateRA, random gate",
            "hira",
            RandomGateConfig(),
            rate_of="gatera",
            seeds=MORE_SEEDS,
        ),
        Method(
            "gatera_no_entropy",
            "GateRA without entropy",
            "hira",
            TokenGateConfig(entropy_weight=0.0),
            rates=HADAMARD_RATE_GRID,
        ),
        Method("dora", "DoRA", "dora", rates=LOW_RATE_GRID),
        Method("gated_lora", "gated LoRA", "lora", TokenGateConfig(), rates=LOW_RATE_GRID),
        Method(
            "gatera_saturating",
            "GateRA, saturating gate",
            "hira",
            TokenGateConfig(**SATURATING),
            rate_of="gatera",
            families=("commonsense",),
        ),
        Method(
            "gatera_thresholds",
            "GateRA, saturating gate with thresholds",
            "hira",
            TokenGateConfig(**SATURATING, skip_below=0.1, merge_above=0.9, gradient_share=0.125),
            rate_of="gatera",
            families=("commonsense",),
        ),
        Method(
            "hira_bf16",
            "HiRA in bfloat16",
            "hira",
            rate_of="hira",
            dtype="bfloat16",
            families=("commonsense",),
        ),
        Method(
            "hira_bf16_rounded",
            "HiRA in bfloat16, stochastic rounding",
            "hira",
            rate_of="hira",
            dtype="bfloat16",
            stochastic_rounding=True,
            families=("commonsense",),
        ),
        Method(
            "hira_random_matrix",
            "HiRA, random matrix for W0",
            "hira_random_matrix",
            rates=HADAMARD_RATE_GRID,
        ),
        Method(
            "lora_equal_time",
            "LoRA, equal time",
            "lora",
            rate_of="lora",
            steps=LORA_STEPS_OF_EQUAL_TIME,
        ),
        Method(
            "hira_static_open",
            "HiRA, static gate from 0.7",
            "hira",
            StaticGateConfig(bias=STATIC_BIAS_OF_EQUAL_MEAN),
            rate_of="gatera",
            families=("commonsense", "math"),
        ),
        Method(
            "gatera_random_open",
            "GateRA, random gate from 0.7",
            "hira",
            RandomGateConfig(bias=RANDOM_BIAS_OF_EQUAL_MEAN),
            rate_of="gatera",
            families=("commonsense", "math"),
        ),
        Method(
            "hira_static_low",
            "HiRA, static gate from 0.3",
            "hira",
            StaticGateConfig(bias=STATIC_BIAS_ON_DIALOGUE),
            rate_of="gatera",
            families=("dialogue",),
        ),
        Method(
            "gatera_random_low",
            "GateRA, random gate from 0.3",
            "hira",
            RandomGateConfig(bias=RANDOM_BIAS_ON_DIALOGUE),
            rate_of="gatera",
            families=("dialogue",),
        ),
    )
}
"""Name -> method, in the order in which they are run."""
