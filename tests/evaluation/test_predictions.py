"""Records of predictions, compared with ones made by hand."""

from gatera_lightning.evaluation.likelihood_ranking import RankedQuestion
from gatera_lightning.evaluation.predictions import (
    GeneratedAnswer,
    TextWithReference,
    generation_record,
    likelihood_record,
)


def test_generation_record_holds_answer_or_reference():
    """A text with a reference is not judged, so its record has no answer."""
    answer = {"text": "so it is b", "answer": "b", "choice": 1}
    assert generation_record(GeneratedAnswer("so it is b", "b", 1)) == answer
    nothing = {"text": "so it is", "answer": None, "choice": None}
    assert generation_record(GeneratedAnswer("so it is", None, None)) == nothing
    compared = {"text": "i have a dog", "reference": "a cat"}
    assert generation_record(TextWithReference("i have a dog", "a cat")) == compared


def test_likelihood_record_holds_choice_of_every_score():
    question = RankedQuestion(7, 1, (-4.0, -2.0, -9.0), (8, 1, 9), (2, 1, 90))
    assert likelihood_record(question) == {
        "log_likelihoods": [-4.0, -2.0, -9.0],
        "tokens": [8, 1, 9],
        "characters": [2, 1, 90],
        "choice": {"sum": 1, "per_token": 0, "per_character": 2},
    }
