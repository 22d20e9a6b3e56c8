"""Tests of highlight_supervised: which tokens are marked, with and without color."""

import pytest
from rich.console import Console
from tiny_backbone import tiny_data

from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.datamodules.loss_mask_view import highlight_supervised


@pytest.fixture(scope="module")
def tokenizer(tiny_backbone):
    return tiny_data(tiny_backbone).tokenizer


def batch_of(tokenizer, *examples, train_on="response"):
    sequences = [
        TokenSequence(
            tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id], example_id=i
        )
        for i, (prompt, answer) in enumerate(examples)
    ]
    return collate(sequences, pad_id=tokenizer.pad_token_id, train_on=train_on)


def test_highlight_marks_answer_and_omits_padding(tokenizer):
    batch = batch_of(
        tokenizer,
        ("Question: why?\nAnswer:", " so"),
        ("Question: what on earth?\nAnswer:", " a very long one"),
    )
    short, long = (str(highlight_supervised(tokenizer, batch, row, color=False)) for row in (0, 1))
    assert short == "  Question: why?\n  Answer:⟦ so<|eos|>⟧"
    assert long == "  Question: what on earth?\n  Answer:⟦ a very long one<|eos|>⟧"


def test_highlight_uses_color_instead_of_brackets(tokenizer):
    text = highlight_supervised(tokenizer, batch_of(tokenizer, ("Why? Answer:", " so")), 0, color=True)
    assert text.plain == "  Why? Answer: so<|eos|>"
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert styles == {"Why? Answer:": "dim", " so<|eos|>": "bold green"}


def test_highlight_marks_all_but_first_token_if_all_are_supervised(tokenizer):
    batch = batch_of(tokenizer, ("Why? Answer:", " so"), train_on="all")
    text = str(highlight_supervised(tokenizer, batch, 0, color=False))
    first = tokenizer.decode(batch["input_ids"][0, :1])
    assert text == f"  {first}⟦{'Why? Answer: so<|eos|>'.removeprefix(first)}⟧"


def test_highlight_marks_several_responses(tokenizer):
    """In a dialogue with two supervised turns, the labels decide, not the position of the answer."""
    turns = [("user: hi", False), (" bot: hello", True), (" user: bye", False), (" bot: see you", True)]
    ids = [(token, supervised) for text, supervised in turns for token in tokenizer(text).input_ids]
    batch = collate([TokenSequence([t for t, _ in ids], [], example_id=0)], pad_id=0, train_on="all")
    for i, (_, supervised) in enumerate(ids):
        if not supervised:
            batch["labels"][0, i] = -100
    text = str(highlight_supervised(tokenizer, batch, 0, color=False))
    assert text == "  user: hi⟦ bot: hello⟧ user: bye⟦ bot: see you⟧"


def test_highlight_prints_brackets_verbatim(tokenizer, capsys):
    batch = batch_of(tokenizer, ("Is [bold]x[/bold] [1]? Answer:", " [red]"))
    Console().print(highlight_supervised(tokenizer, batch, 0, color=False))
    assert "Is [bold]x[/bold] [1]? Answer:⟦ [red]<|eos|>⟧" in capsys.readouterr().out
