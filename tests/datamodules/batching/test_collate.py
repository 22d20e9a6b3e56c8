"""Batches by hand: padding, labels and counts."""

import pytest
import torch

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate, collate_prompts
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_example

EOS, BOS = 0, 1
X = IGNORE_INDEX


def test_collate_by_hand(tokenizers_by_kind):
    prompt, answers, truncated = tokenize_example(
        tokenizers_by_kind["words"], "Question: cat?\nAnswer:", [" yes", " no never"], 99
    )
    assert (prompt, answers, truncated) == ([3, 4, 5], [[6, EOS], [7, 8, EOS]], False)

    sequences = [
        TokenSequence(prompt, ids, example_id=9 + i, answer=i, gold=1, characters=3 + 5 * i)
        for i, ids in enumerate(answers)
    ]
    batch = collate(sequences, pad_id=EOS, train_on="response")
    assert batch["input_ids"].tolist() == [[3, 4, 5, 6, 0, 0], [3, 4, 5, 7, 8, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[X, X, X, 6, 0, X], [X, X, X, 7, 8, 0]]
    assert batch["response_mask"].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert (batch["step_supervised_tokens"], batch["step_tokens"]) == (5, 11)
    assert batch["example_ids"].tolist() == [9, 10]
    assert batch["answer_ids"].tolist() == [0, 1]
    assert batch["gold_ids"].tolist() == [1, 1]
    assert batch["answer_characters"].tolist() == [3, 8]
    assert batch["all_candidates_present"] is False
    assert (
        collate(sequences, pad_id=EOS, train_on="response", all_candidates_present=True)[
            "all_candidates_present"
        ]
        is True
    )

    batch = collate(sequences, pad_id=EOS, train_on="all")
    assert batch["labels"].tolist() == [[X, 4, 5, 6, 0, X], [X, 4, 5, 7, 8, 0]]
    assert (batch["step_supervised_tokens"], batch["step_tokens"]) == (9, 11)
    assert batch["response_mask"].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


def test_collate_with_bos(tokenizers_by_kind):
    prompt, answers, _ = tokenize_example(
        tokenizers_by_kind["words_bos"], "Question: cat?\nAnswer:", [" yes"], 99
    )
    assert (prompt, answers) == ([BOS, 3, 4, 5], [[6, EOS]])
    sequences = [TokenSequence(prompt, answers[0], example_id=0)]
    assert collate(sequences, pad_id=EOS, train_on="response")["labels"].tolist() == [[X, X, X, X, 6, 0]]
    assert collate(sequences, pad_id=EOS, train_on="all")["labels"].tolist() == [[X, 3, 4, 5, 6, 0]]


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_first_token_is_not_supervised(train_on):
    """It has no predecessor, and is not counted either."""
    batch = collate([TokenSequence([], [6, 7, 0], example_id=0)], pad_id=0, train_on=train_on)
    assert batch["labels"].tolist() == [[X, 7, 0]]
    assert batch["response_mask"].tolist() == [[True, True, True]]
    assert batch["step_supervised_tokens"] == 2


def test_pad_id_within_text_is_supervised():
    """Masks depend on lengths, not on token ids."""
    sequences = [TokenSequence([5, 0], [0, 6, 0], example_id=0), TokenSequence([5], [0], example_id=1)]
    batch = collate(sequences, pad_id=0, train_on="all")
    assert batch["labels"].tolist() == [[X, 0, 0, 6, 0], [X, 0, X, X, X]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]


def test_sequences_are_padded_right():
    batch = collate([TokenSequence([5], [6]), TokenSequence([5, 5], [6, 6])], pad_id=77, train_on="response")
    assert batch["input_ids"].tolist() == [[5, 6, 77, 77], [5, 5, 6, 6]]


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_dummy_example_is_not_supervised(train_on):
    sequences = [TokenSequence([3, 4], [6, 0], example_id=5), TokenSequence([3, 4], [6, 0], example_id=-1)]
    batch = collate(sequences, pad_id=0, train_on=train_on)
    assert (batch["labels"][1] == X).all()
    assert (batch["labels"][0] != X).any()
    assert batch["attention_mask"][1].any()  # attention over no token would be NaN
    alone = collate(sequences[1:], pad_id=0, train_on=train_on)
    assert alone["step_supervised_tokens"] == 0
    assert alone["example_ids"].tolist() == [-1]


def test_step_totals_are_integers():
    batch = collate([TokenSequence([3], [6, 0], example_id=0)], pad_id=0, train_on="all")
    assert type(batch["step_supervised_tokens"]) is type(batch["step_tokens"]) is int


@pytest.mark.parametrize(
    ("train_on", "labels"),
    [
        ("response", [X, X, X, X, X, X, 6, 0]),
        ("every_response", [X, 4, X, 8, 8, X, 6, 0]),
        ("all", [X, 4, 5, 8, 8, 7, 6, 0]),
    ],
)
def test_earlier_responses_are_supervised(train_on, labels):
    sequence = TokenSequence([3, 4, 5, 8, 8, 7], [6, 0], earlier_responses=[[0, 2], [3, 5]], example_id=0)
    dummy = TokenSequence([3, 4, 5], [6, 0], earlier_responses=[(0, 2)], example_id=-1)
    batch = collate([sequence, dummy], pad_id=0, train_on=train_on)
    assert batch["labels"].tolist() == [labels, [X] * 8]
    assert batch["response_mask"][0].int().tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert batch["step_supervised_tokens"] == sum(label != X for label in labels)


# --- prompts ---


def test_prompts_are_padded_left():
    batch = collate_prompts([[3, 4, 5], [6], [7, 0]], [9, 2, -1], pad_id=77, eos_id=0)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [77, 77, 6], [77, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["example_ids"].tolist() == [9, 2, -1]
    assert (batch["pad_id"], batch["eos_id"]) == (77, 0)
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "example_ids")} == {torch.int64}


def test_pad_id_within_prompt_is_attended():
    batch = collate_prompts([[0, 5, 0], [5]], [0, 1], pad_id=0, eos_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
