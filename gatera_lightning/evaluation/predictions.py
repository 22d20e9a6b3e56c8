"""What an evaluation stores about each example, by likelihood and by generation."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from gatera_lightning.evaluation.likelihood_ranking import RankedQuestion, Score

Kind = Literal["likelihood", "generation"]
"""How an example is evaluated: by the likelihood of its candidates, or by a generated text."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Records = dict[tuple[Kind, int], dict[str, Any]]
"""(kind, index of the example within its split) -> record."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generated text that is right or wrong.

    Attributes:
        text: What the model generated.
        answer: The answer parsed from the text; None if there is none.
        choice: Index of the candidate that the answer names; None without an answer or a matching candidate.
    """

    text: str
    answer: str | None
    choice: int | None


@dataclass(frozen=True)
class TextWithReference:
    """A generated text that is compared with a reference instead of being right or wrong.

    Attributes:
        text: What the model generated.
        reference: The text of the correct answer.
    """

    text: str
    reference: str


def likelihood_record(question: RankedQuestion) -> dict[str, Any]:
    """Record of a question whose candidates were ranked, as ``predictions.jsonl`` stores it."""
    return {
        "log_likelihoods": list(question.log_likelihoods),
        "tokens": list(question.tokens),
        "characters": list(question.characters),
        "choice": {score: question.choice(score) for score in get_args(Score)},
    }


def generation_record(generated: GeneratedAnswer | TextWithReference) -> dict[str, Any]:
    """Record of a generated text, as ``predictions.jsonl`` stores it."""
    return asdict(generated)
