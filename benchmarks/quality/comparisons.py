"""The questions that the comparison answers.

They were written before any tested run, except the last four: these followed when the static and the random
gate had stayed near 0.5, below the mean of GateRA's gates on commonsense and math, and above it on dialogue.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A question that a difference of two methods answers."""

    text: str

    method: str

    reference: str
    """The difference is method − reference."""


QUESTIONS = (
    Question("Does HiRA beat LoRA?", "hira", "lora"),
    Question("Does GateRA beat LoRA?", "gatera", "lora"),
    Question("Does GateRA beat HiRA?", "gatera", "hira"),
    Question("Does a token gate beat a static gate?", "gatera", "hira_static"),
    Question("Does it matter which tokens a gate opens for?", "gatera", "gatera_shuffled"),
    Question("Does a learned gate beat a random one?", "gatera", "gatera_random"),
    Question("Does the entropy term help?", "gatera", "gatera_no_entropy"),
    Question("Does a hard gate lose to none?", "hard_hira", "hira"),
    Question("Does a hard gate lose to a soft one?", "hard_hira", "gatera"),
    Question("Does TS-PEFT's threshold help LoRA?", "ts_peft", "lora"),
    Question("Does a token gate help LoRA?", "gated_lora", "lora"),
    Question("Does DoRA beat LoRA?", "dora", "lora"),
    Question("Does ABBA beat HiRA?", "abba", "hira"),
    Question("Does HiRA need W0 itself?", "hira", "hira_random_matrix"),
    Question("Does GateRA beat LoRA of equal time?", "gatera", "lora_equal_time"),
    Question("Do thresholds in training lose to exact steps?", "gatera_thresholds", "gatera_saturating"),
    Question("Does stochastic rounding in bfloat16 lose to two terms?", "hira_bf16_rounded", "hira_bf16"),
    Question("Does a token gate beat a static gate of about its mean?", "gatera", "hira_static_open"),
    Question("Does a learned gate beat a random one of about its mean?", "gatera", "gatera_random_open"),
    Question("Does a token gate beat a static gate of about its mean?", "gatera", "hira_static_low"),
    Question("Does a learned gate beat a random one of about its mean?", "gatera", "gatera_random_low"),
)
"""All of them are one family of tests in each measure, whose p-values are adjusted together."""
