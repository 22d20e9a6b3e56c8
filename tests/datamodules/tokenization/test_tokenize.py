"""Tokenizing: the boundary between prompt and answer, truncation, and token ranges of characters."""

import pytest

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.datamodules.tasks.commonsense import TASKS
from gatera_lightning.datamodules.tokenization.tokenize import token_ranges, tokenize_example

EOS, BOS = 0, 1
KINDS = ["plain", "bos", "closing", "closing_without_bos", "bos_is_eos", "pieces", "spanning"]
QUESTION = (
    "Please choose the correct answer to the question: Where is milk kept?\n\n"
    "Answer1: shed Answer2: fridge\n\nAnswer format: answer1/answer2"
)


def _texts(template):
    prompt, (answer,) = render(template, QUESTION, ["the correct answer is answer2"])
    return prompt, answer


# --- boundary ---


def _running_text(tokenizer, text):
    """Token ids of a text, with exactly one EOS at its end."""
    ids = tokenizer(text).input_ids
    return ids if ids[-1] == EOS else [*ids, EOS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_answer_continues_prompt(kind, template, tokenizers_by_kind):
    tokenizer = tokenizers_by_kind[kind]
    prompt, answer = _texts(template)
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizer, prompt, [answer], 9999)
    assert answer_ids[-1] == EOS
    assert EOS not in answer_ids[:-1]
    assert prompt_ids[-1] != EOS
    assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == prompt
    if kind != "spanning":
        assert prompt_ids + answer_ids == _running_text(tokenizer, prompt + answer)


@pytest.mark.parametrize("kind", ["plain", "bos", "closing", "pieces"])
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_prompt_is_tokenized_as_for_generation(kind, template, tokenizers_by_kind):
    tokenizer = tokenizers_by_kind[kind]
    prompt, answer = _texts(template)
    seen = tokenizer(prompt).input_ids
    assert tokenize_example(tokenizer, prompt, [answer], 9999)[0] == (
        seen[:-1] if kind == "closing" else seen
    )


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_token_across_boundary_does_not_change_prompt(template, tokenizers_by_kind):
    """``\\nt`` and ``: `` are single tokens here."""
    tokenizer = tokenizers_by_kind["spanning"]
    prompt, answer = _texts(template)
    joint = tokenizer(prompt + answer).input_ids
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizer, prompt, [answer], 9999)
    assert joint[: len(prompt_ids)] != prompt_ids  # otherwise this tests nothing
    assert prompt_ids == tokenizer(prompt).input_ids
    assert tokenizer.decode(answer_ids) == answer + "<eos>"


@pytest.mark.parametrize("kind", ["bos", "pieces"])
def test_chat_answer_continues_prompt(kind, tokenizers_by_kind):
    """On its own, a text of ``pieces`` starts with an additional space."""
    tokenizer, prompt = tokenizers_by_kind[kind], "<bos>Question: Where? Answer:\n"
    prompt_ids, (answer_ids,), _ = tokenize_example(
        tokenizer, prompt, ["fridge"], 99, special_tokens=False, answer_suffix="<unk>"
    )
    text_ids = tokenizer(f"{prompt}fridge<unk>", add_special_tokens=False).input_ids
    assert prompt_ids + answer_ids == [*text_ids, EOS]
    assert answer_ids[-2:] == [2, EOS]  # <unk> is the suffix here


@pytest.mark.parametrize("kind", ["bos", "closing", "pieces", "words_bos"])
def test_bos_occurs_once_at_start(kind, tokenizers_by_kind):
    prompt, answer = _texts("plain")
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizers_by_kind[kind], prompt, [answer], 9999)
    assert [i for i, token in enumerate(prompt_ids + answer_ids) if token == BOS] == [0]


@pytest.mark.parametrize("kind", ["plain", "closing_without_bos", "words"])
def test_bos_is_not_added_without_tokenizer(kind, tokenizers_by_kind):
    prompt, answer = _texts("plain")
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizers_by_kind[kind], prompt, [answer], 9999)
    assert BOS not in prompt_ids + answer_ids


def test_bos_equal_to_eos_is_kept_at_start(tokenizers_by_kind):
    """As in OPT."""
    prompt_ids, (answer_ids,), _ = tokenize_example(
        tokenizers_by_kind["bos_is_eos"], "Question:", [" milk"], 99
    )
    assert prompt_ids[0] == answer_ids[-1] == EOS
    assert (prompt_ids + answer_ids).count(EOS) == 2
    assert tokenize_example(tokenizers_by_kind["bos_is_eos"], "", [" milk"], 99)[0] == [EOS]


def test_appended_eos_equal_to_bos_is_removed_from_prompt(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["bos_is_eos_closing"]
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizer, "Question:", [" milk"], 99)
    assert prompt_ids + answer_ids == tokenizer("Question: milk").input_ids


def test_candidates_share_prompt(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["bos"]
    prompt, _ = _texts("plain")
    answers = [" a shed", " the fridge", " answer1", "\n"]
    joint = tokenize_example(tokenizer, prompt, answers, 9999)
    separate = [tokenize_example(tokenizer, prompt, [answer], 9999) for answer in answers]
    assert joint == (separate[0][0], [answer_ids for _, (answer_ids,), _ in separate], False)


def test_smollm2_boundary_and_eos(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id
    for template in ("alpaca", "plain"):
        prompt, answer = _texts(template)
        prompt_ids, (answer_ids,), _ = tokenize_example(smollm2, prompt, [answer], 9999)
        assert prompt_ids + answer_ids == [*smollm2(prompt + answer).input_ids, smollm2.eos_token_id]
        sequences = [
            TokenSequence(prompt_ids, answer_ids, example_id=0),
            TokenSequence(prompt_ids, [7], example_id=1),
        ]
        labels = collate(sequences, pad_id=smollm2.pad_token_id, train_on="response")["labels"]
        assert smollm2.decode(labels[0][labels[0] != IGNORE_INDEX]) == answer + smollm2.eos_token
        assert labels[1][labels[1] != IGNORE_INDEX].tolist() == [7]


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_smollm2_answers_continue_published_prompts(template, answer_format, smollm2, real_data, make_data):
    """In ten examples of every task, no token spans the boundary."""
    tasks = [f"{task}[:10]" for task in TASKS if task != "everyday"]
    data = make_data(template=template, answer_format=answer_format, test=tasks, data_dir=str(real_data))
    examples = list(data.examples("test"))
    assert len(examples) == 80
    for example in examples:
        prompt_ids, candidates, _ = tokenize_example(smollm2, example.prompt, example.answers, 9999)
        for answer, answer_ids in zip(example.answers, candidates, strict=True):
            assert prompt_ids + answer_ids == [
                *smollm2(example.prompt + answer).input_ids,
                smollm2.eos_token_id,
            ]


# --- truncation ---


def _untruncated(tokenizer, answers):
    return tokenize_example(tokenizer, "Question: " + "cat? " * 20 + "Answer:", answers, 9999)


@pytest.mark.parametrize(
    ("kind", "max_length", "prompt", "truncated"),
    [
        ("words", 6, [3, 4, 5], False),
        ("words", 5, [4, 5], True),
        ("words", 4, [5], True),
        ("words_bos", 7, [BOS, 3, 4, 5], False),
        ("words_bos", 6, [BOS, 4, 5], True),
        ("words_bos", 5, [BOS, 5], True),
    ],
)
def test_truncation_by_hand(kind, max_length, prompt, truncated, tokenizers_by_kind):
    """The longest candidate has three tokens."""
    answers = [" yes", " no never"]
    result = tokenize_example(tokenizers_by_kind[kind], "Question: cat?\nAnswer:", answers, max_length)
    assert result == (prompt, [[6, EOS], [7, 8, EOS]], truncated)


@pytest.mark.parametrize(("kind", "max_length"), [("words", 3), ("words_bos", 4), ("words", 1)])
def test_truncation_rejects_too_long_answer(kind, max_length, tokenizers_by_kind):
    with pytest.raises(ValueError, match=f"an answer has 3 tokens.*max_length {max_length}$"):
        tokenize_example(
            tokenizers_by_kind[kind], "Question: cat?\nAnswer:", [" yes", " no never"], max_length
        )


@pytest.mark.parametrize("kind", ["plain", "bos", "closing", "pieces", "bos_is_eos"])
def test_truncation_cuts_prompt_after_bos(kind, tokenizers_by_kind):
    tokenizer = tokenizers_by_kind[kind]
    candidates = [" yes", " the correct answer is answer2"]
    prompt, answers, _ = _untruncated(tokenizer, candidates)
    longest = max(map(len, answers))
    bos = 0 if kind == "plain" else 1
    for max_length in range(longest + bos + 1, longest + len(prompt)):
        cut, same, truncated = tokenize_example(
            tokenizer, "Question: " + "cat? " * 20 + "Answer:", candidates, max_length
        )
        assert (same, truncated) == (answers, True)
        assert len(cut) + longest == max_length
        assert cut[:bos] == prompt[:bos]
        assert cut[bos:] == prompt[len(prompt) - len(cut) + bos :]


def test_empty_prompt_needs_room_for_answer_only(tokenizers_by_kind):
    assert tokenize_example(tokenizers_by_kind["words"], "", [" yes"], 2) == ([], [[6, EOS]], False)
    with pytest.raises(ValueError, match=r"an answer has 2 tokens.*max_length 1$"):
        tokenize_example(tokenizers_by_kind["words"], "", [" yes"], 1)


# --- token ranges ---


@pytest.mark.parametrize(
    ("kind", "ranges", "expected"),
    [
        ("words", [(10, 14)], [(1, 2)]),
        ("words", [(0, 14)], [(0, 2)]),
        ("words", [(9, 22), (23, 26)], [(1, 3), (3, 4)]),  # spaces belong to no token
        ("words", [(11, 14)], []),  # a token belongs to the range of its first character
        ("words", [(11, 16)], [(2, 3)]),
        ("words", [(5, 5)], []),
        ("words", [], []),
        ("words_bos", [(10, 14)], [(2, 3)]),
        ("words_bos", [(0, 14)], [(1, 3)]),  # BOS has no characters
    ],
)
def test_token_ranges_by_hand(kind, ranges, expected, tokenizers_by_kind):
    text = "Question: cat? Answer: yes"
    tokenizer = tokenizers_by_kind[kind]
    assert (
        token_ranges(tokenizer, text, ranges, tokenize_example(tokenizer, text, [" no"], 99)[0]) == expected
    )


@pytest.mark.parametrize(
    ("kind", "prompt_ids", "expected"),
    [
        ("words", [3, 4, 5, 6], [(0, 2), (3, 4)]),
        ("words", [4, 5, 6], [(0, 1), (2, 3)]),
        ("words", [5, 6], [(1, 2)]),
        ("words", [6], [(0, 1)]),
        ("words_bos", [BOS, 3, 4, 5, 6], [(1, 3), (4, 5)]),
        ("words_bos", [BOS, 4, 5, 6], [(1, 2), (3, 4)]),
        ("words_bos", [BOS, 5, 6], [(2, 3)]),
        ("words_bos", [BOS, 6], [(1, 2)]),
    ],
)
def test_token_ranges_shift_with_truncation(kind, prompt_ids, expected, tokenizers_by_kind):
    text = "Question: cat? Answer: yes"
    tokenizer = tokenizers_by_kind[kind]
    assert tokenize_example(tokenizer, text, [" no"], len(prompt_ids) + 2)[0] == prompt_ids
    assert token_ranges(tokenizer, text, [(0, 14), (22, 26)], prompt_ids) == expected


@pytest.mark.parametrize(
    "kind", ["plain", "bos", "closing", "closing_without_bos", "bos_is_eos", "bos_is_eos_closing"]
)
def test_token_ranges_decode_to_their_characters(kind, tokenizers_by_kind):
    """In a text whose characters have several tokens each."""
    tokenizer = tokenizers_by_kind[kind]
    text = "Antwort: über 👋 den Wolken 中文 the correct answer is answer1 ende"
    pieces = [" über 👋", " 中文", " the correct answer", " ende"]
    ranges = [(text.index(piece), text.index(piece) + len(piece)) for piece in pieces]
    prompt = tokenize_example(tokenizer, text, [" no"], 999)[0]
    found = token_ranges(tokenizer, text, ranges, prompt)
    assert [tokenizer.decode(prompt[start:end]) for start, end in found] == pieces


def test_token_ranges_include_special_tokens_in_text(chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    text = "<bos><start_of_turn>model\nyes<end_of_turn>\n"
    prompt = tokenize_example(tokenizer, text, ["no"], 99, special_tokens=False)[0]
    start = text.index("yes")
    ((begin, end),) = token_ranges(tokenizer, text, [(start, len(text) - 1)], prompt, special_tokens=False)
    assert tokenizer.decode(prompt[begin:end]) == "yes<end_of_turn>"
    assert token_ranges(tokenizer, text, [(0, 5)], prompt, special_tokens=False) == [(0, 1)]


def test_token_ranges_reject_slow_tokenizer(tokenizers_by_kind, monkeypatch):
    tokenizer = tokenizers_by_kind["words"]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(
        ValueError,
        match=r"^train_on every_response needs a fast tokenizer, which reports the characters of each",
    ):
        token_ranges(tokenizer, "cat?", [(0, 4)], [4])
