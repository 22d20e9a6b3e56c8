"""Prompts of the benchmark of drafts: held-out examples, one of each dialogue."""

import os
from pathlib import Path

import pytest
from tiny_backbone import sample_rows, tiny_tokenizer

DATA = os.environ.get("GATERA_DATA", "")


@pytest.fixture
def texts(monkeypatch):
    """``texts(family, count)``: the prompts as texts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks.harness.held_out_prompts import held_out_prompts

    tokenizer = tiny_tokenizer()
    return lambda *args: [tokenizer.decode(ids) for ids in held_out_prompts(args[0], tokenizer, *args[1:])]


def test_quickstart_asks_test_questions(texts):
    asked = [row["instruction"].splitlines()[0] for row in sample_rows("test")[:2]]
    questions = [line.partition("question: ")[2] for line in asked]
    found = texts("quickstart", 2)
    assert all(question in text for question, text in zip(questions, found, strict=True))
    with pytest.raises(ValueError, match="--questions: 1000; accepted for quickstart: at most 144"):
        texts("quickstart", 1000)


@pytest.mark.skipif(not DATA, reason="needs GATERA_DATA")
def test_dialogues_are_not_those_of_training(texts):
    lines = Path(DATA, "dialogue", "convai2", "valid_self_original.shared.txt").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("1 ")]
    trained, held_out = "\n".join(lines[: starts[61]]), "\n".join(lines[starts[61] :])
    partners = [text.split("Partner: ")[1].split("\n")[0] for text in texts("dialogue", 3)]
    assert all(partner in held_out for partner in partners)
    personas = [text.split("Persona: ")[1].split(". ")[0] for text in texts("dialogue", 3)]
    assert len(set(personas)) == 3
    assert not any(persona in trained for persona in personas)


@pytest.mark.skipif(not DATA, reason="needs GATERA_DATA")
def test_math_asks_questions_of_the_test_split(texts):
    (first,) = texts("math", 1)
    assert "Janet" in first
