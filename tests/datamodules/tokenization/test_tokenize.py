"""Where an answer begins, what is cut, and what carries loss."""

import pytest
import torch

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate, collate_prompts
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.prompts.templates import render
from gatera_lightning.datamodules.tasks.commonsense import TASKS
from gatera_lightning.datamodules.tokenization.loss_mask import supervised_ranges
from gatera_lightning.datamodules.tokenization.tokenize import token_ranges, tokenize_example

EOS, BOS = 0, 1
ROW = {
    "instruction": "Please choose the correct answer to the question: Where is milk kept?\n\n"
    "Answer1: shed Answer2: fridge\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
KINDS = ["plain", "bos", "closing", "closing_without_bos", "bos_is_eos", "pieces", "spanning"]
X = IGNORE_INDEX


def _texts(template):
    prompt, (answer,) = render(template, ROW["instruction"], ["the correct answer is answer2"])
    return prompt, answer


def _padded(rows, width):
    return [row + [X] * (width - len(row)) for row in rows]


# --- targets of whole data modules, as text ---

EXPECTED = {  # (template, answer_format): prompt, answer
    ("alpaca", "label"): (ALPACA.format(ROW["instruction"]), "the correct answer is answer2"),
    ("plain", "label"): (f"Question: {ROW['instruction']}\nAnswer:", " the correct answer is answer2"),
    ("alpaca", "content"): (ALPACA.format("Where is milk kept?"), "fridge"),
    ("plain", "content"): ("Question: Where is milk kept?\nAnswer:", " fridge"),
}


@pytest.mark.parametrize("kind", ["bos", "closing", "bos_is_eos"])
@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(("template", "answer_format"), EXPECTED)
def test_targets_as_text(template, answer_format, train_on, kind, make_data, write, tokenizers_by_kind):
    tokenizer = tokenizers_by_kind[kind]
    sources = [write("row.json", [ROW])]
    data = make_data(
        template=template,
        answer_format=answer_format,
        train_on=train_on,
        validation=sources,
        tokenizer=tokenizer,
        stage="validate",
    )
    (batch,) = data.val_dataloader()
    labels, ids, response = batch["labels"][0], batch["input_ids"][0], batch["response_mask"][0]
    prompt, answer = EXPECTED[template, answer_format]
    wanted = prompt + answer if train_on == "all" else answer
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == wanted + "<eos>"
    assert tokenizer.decode(ids[1:]) == prompt + answer + "<eos>"
    assert tokenizer.decode(ids[response]) == answer + "<eos>"
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    assert ids.tolist().count(tokenizer.bos_token_id) == (2 if kind == "bos_is_eos" else 1)


# --- label ids, by hand ---


def test_label_ids_of_a_small_case(tokenizers_by_kind):
    prompt, answers, shortened = tokenize_example(
        tokenizers_by_kind["words"], "Question: cat?\nAnswer:", [" yes", " no never"], 99
    )
    assert (prompt, answers, shortened) == ([3, 4, 5], [[6, EOS], [7, 8, EOS]], False)

    rows = [
        TokenSequence(prompt, ids, example_id=9 + i, answer=i, gold=1, characters=3 + 5 * i)
        for i, ids in enumerate(answers)
    ]
    batch = collate(rows, pad_id=EOS, train_on="response")
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
        collate(rows, pad_id=EOS, train_on="response", all_candidates_present=True)["all_candidates_present"]
        is True
    )

    batch = collate(rows, pad_id=EOS, train_on="all")
    assert batch["labels"].tolist() == [[X, 4, 5, 6, 0, X], [X, 4, 5, 7, 8, 0]]
    assert (batch["step_supervised_tokens"], batch["step_tokens"]) == (9, 11)
    assert batch["response_mask"].int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


def test_label_ids_with_bos(tokenizers_by_kind):
    prompt, answers, _ = tokenize_example(tokenizers_by_kind["words_bos"], "Question: cat?\nAnswer:", [" yes"], 99)
    assert (prompt, answers) == ([BOS, 3, 4, 5], [[6, EOS]])
    rows = [TokenSequence(prompt, answers[0], example_id=0)]
    assert collate(rows, pad_id=EOS, train_on="response")["labels"].tolist() == [[X, X, X, X, 6, 0]]
    assert collate(rows, pad_id=EOS, train_on="all")["labels"].tolist() == [[X, 3, 4, 5, 6, 0]]


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_the_first_token_of_a_row_is_never_a_target(train_on):
    """It has no predecessor: shifted labels would drop it, and the totals must know."""
    batch = collate([TokenSequence([], [6, 7, 0], example_id=0)], pad_id=0, train_on=train_on)
    assert batch["labels"].tolist() == [[X, 7, 0]]
    assert batch["response_mask"].tolist() == [[True, True, True]]
    assert batch["step_supervised_tokens"] == 2


def test_pad_tokens_inside_a_text_are_targets():
    """The pad id may occur as a real token anywhere; masks go by length."""
    rows = [TokenSequence([5, 0], [0, 6, 0], example_id=0), TokenSequence([5], [0], example_id=1)]
    batch = collate(rows, pad_id=0, train_on="all")
    assert batch["labels"].tolist() == _padded([[X, 0, 0, 6, 0], [X, 0]], 5)
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]


def test_rows_are_padded_on_the_right_with_the_pad_id():
    batch = collate(
        [TokenSequence([5], [6]), TokenSequence([5, 5], [6, 6])], pad_id=77, train_on="response"
    )
    assert batch["input_ids"].tolist() == [[5, 6, 77, 77], [5, 5, 6, 6]]


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_a_row_that_counts_for_nothing_has_no_targets(train_on):
    rows = [TokenSequence([3, 4], [6, 0], example_id=5), TokenSequence([3, 4], [6, 0], example_id=-1)]
    batch = collate(rows, pad_id=0, train_on=train_on)
    assert (batch["labels"][1] == X).all()
    assert (batch["labels"][0] != X).any()
    assert batch["attention_mask"][1].any()  # attention over nothing is NaN
    alone = collate(rows[1:], pad_id=0, train_on=train_on)
    assert alone["step_supervised_tokens"] == 0
    assert alone["example_ids"].tolist() == [-1]


def test_counts_are_plain_integers():
    batch = collate([TokenSequence([3], [6, 0], example_id=0)], pad_id=0, train_on="all")
    assert type(batch["step_supervised_tokens"]) is type(batch["step_tokens"]) is int


@pytest.mark.parametrize(
    ("prompt", "length", "earlier", "train_on", "expected"),
    [
        (3, 5, [], "response", [(3, 5)]),
        (3, 5, [(1, 2)], "response", [(3, 5)]),
        (3, 5, [], "every_response", [(3, 5)]),
        (9, 12, [(2, 4), (6, 7)], "every_response", [(2, 4), (6, 7), (9, 12)]),
        (9, 12, [[0, 4]], "every_response", [(1, 4), (9, 12)]),  # the first token has no predecessor
        (9, 12, [(2, 4)], "all", [(1, 12)]),
        (0, 3, [], "response", [(1, 3)]),
        (0, 3, [], "every_response", [(1, 3)]),
        (0, 3, [], "all", [(1, 3)]),
    ],
)
def test_ranges_of_targets(prompt, length, earlier, train_on, expected):
    assert supervised_ranges(prompt, length, earlier, train_on) == expected


@pytest.mark.parametrize(
    ("train_on", "labels"),
    [
        ("response", [X, X, X, X, X, X, 6, 0]),
        ("every_response", [X, 4, X, 8, 8, X, 6, 0]),
        ("all", [X, 4, 5, 8, 8, 7, 6, 0]),
    ],
)
def test_labels_of_earlier_responses(train_on, labels):
    row = TokenSequence([3, 4, 5, 8, 8, 7], [6, 0], earlier_responses=[[0, 2], [3, 5]], example_id=0)
    filler = TokenSequence([3, 4, 5], [6, 0], earlier_responses=[(0, 2)], example_id=-1)
    batch = collate([row, filler], pad_id=0, train_on=train_on)
    assert batch["labels"].tolist() == [labels, [X] * 8]
    assert batch["response_mask"][0].int().tolist() == [
        0,
        0,
        0,
        0,
        0,
        0,
        1,
        1,
    ]  # the answer's, whatever is trained on
    assert batch["step_supervised_tokens"] == sum(label != X for label in labels)


# --- where earlier responses stand ---


@pytest.mark.parametrize(
    ("kind", "ranges", "expected"),
    [
        ("words", [(10, 14)], [(1, 2)]),
        ("words", [(0, 14)], [(0, 2)]),
        ("words", [(9, 22), (23, 26)], [(1, 3), (3, 4)]),  # the space before a word is no token's
        ("words", [(11, 14)], []),  # a token belongs where it begins
        ("words", [(11, 16)], [(2, 3)]),
        ("words", [(5, 5)], []),
        ("words", [], []),
        ("words_bos", [(10, 14)], [(2, 3)]),
        ("words_bos", [(0, 14)], [(1, 3)]),  # BOS stands for no character
    ],
)
def test_token_ranges_by_hand(kind, ranges, expected, tokenizers_by_kind):
    text = "Question: cat? Answer: yes"
    tokenizer = tokenizers_by_kind[kind]
    assert token_ranges(tokenizer, text, ranges, tokenize_example(tokenizer, text, [" no"], 99)[0]) == expected


@pytest.mark.parametrize(
    ("kind", "kept", "expected"),
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
def test_ranges_move_with_what_was_cut_off(kind, kept, expected, tokenizers_by_kind):
    text = "Question: cat? Answer: yes"
    tokenizer = tokenizers_by_kind[kind]
    assert tokenize_example(tokenizer, text, [" no"], len(kept) + 2)[0] == kept
    assert token_ranges(tokenizer, text, [(0, 14), (22, 26)], kept) == expected


@pytest.mark.parametrize(
    "kind", ["plain", "bos", "closing", "closing_without_bos", "bos_is_eos", "bos_is_eos_closing"]
)
def test_ranges_hold_the_characters_asked_for(kind, tokenizers_by_kind):
    """Of a text with characters of several tokens each, where ranges begin and end at words."""
    tokenizer = tokenizers_by_kind[kind]
    text = "Antwort: über 👋 den Wolken 中文 the correct answer is answer1 ende"
    pieces = [" über 👋", " 中文", " the correct answer", " ende"]
    ranges = [(text.index(piece), text.index(piece) + len(piece)) for piece in pieces]
    prompt = tokenize_example(tokenizer, text, [" no"], 999)[0]
    found = token_ranges(tokenizer, text, ranges, prompt)
    assert [tokenizer.decode(prompt[start:end]) for start, end in found] == pieces


def test_special_tokens_that_are_text_are_in_ranges(chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    text = "<bos><start_of_turn>model\nyes<end_of_turn>\n"
    prompt = tokenize_example(tokenizer, text, ["no"], 99, special_tokens=False)[0]
    start = text.index("yes")
    ((begin, end),) = token_ranges(tokenizer, text, [(start, len(text) - 1)], prompt, special_tokens=False)
    assert tokenizer.decode(prompt[begin:end]) == "yes<end_of_turn>"
    assert token_ranges(tokenizer, text, [(0, 5)], prompt, special_tokens=False) == [(0, 1)]


def test_ranges_need_a_fast_tokenizer(tokenizers_by_kind, monkeypatch):
    tokenizer = tokenizers_by_kind["words"]
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(
        ValueError,
        match=r"^train_on every_response needs a fast tokenizer, which knows the characters of each",
    ):
        token_ranges(tokenizer, "cat?", [(0, 4)], [4])


# --- prompts to complete ---


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[3, 4, 5], [6], [7, 0]], [9, 2, -1], pad_id=77, eos_id=0)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [77, 77, 6], [77, 7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["example_ids"].tolist() == [9, 2, -1]
    assert (batch["pad_id"], batch["eos_id"]) == (77, 0)
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "example_ids")} == {torch.int64}


def test_pad_tokens_inside_a_prompt_are_real():
    batch = collate_prompts([[0, 5, 0], [5]], [0, 1], pad_id=0, eos_id=0)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# --- the boundary between prompt and answer ---


def _running_text(tokenizer, text):
    """Ids of a whole text as the tokenizer gives them, closed by exactly one EOS."""
    ids = tokenizer(text).input_ids
    return ids if ids[-1] == EOS else [*ids, EOS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_the_answer_continues_the_prompt(kind, template, tokenizers_by_kind):
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
def test_the_prompt_is_what_generation_will_see(kind, template, tokenizers_by_kind):
    tokenizer = tokenizers_by_kind[kind]
    prompt, answer = _texts(template)
    seen = tokenizer(prompt).input_ids
    assert tokenize_example(tokenizer, prompt, [answer], 9999)[0] == (seen[:-1] if kind == "closing" else seen)


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_a_token_that_spans_the_boundary_leaves_the_prompt_alone(template, tokenizers_by_kind):
    """``\\nt`` and ``: `` are single tokens here: the running text has no boundary where the prompt ends."""
    tokenizer = tokenizers_by_kind["spanning"]
    prompt, answer = _texts(template)
    joint = tokenizer(prompt + answer).input_ids
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizer, prompt, [answer], 9999)
    assert joint[: len(prompt_ids)] != prompt_ids  # the case is the one meant
    assert prompt_ids == tokenizer(prompt).input_ids
    assert tokenizer.decode(answer_ids) == answer + "<eos>"


@pytest.mark.parametrize("kind", ["bos", "closing", "pieces", "words_bos"])
def test_bos_stands_once_and_first(kind, tokenizers_by_kind):
    prompt, answer = _texts("plain")
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizers_by_kind[kind], prompt, [answer], 9999)
    assert [i for i, token in enumerate(prompt_ids + answer_ids) if token == BOS] == [0]


@pytest.mark.parametrize("kind", ["plain", "closing_without_bos", "words"])
def test_no_bos_where_the_tokenizer_adds_none(kind, tokenizers_by_kind):
    prompt, answer = _texts("plain")
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizers_by_kind[kind], prompt, [answer], 9999)
    assert BOS not in prompt_ids + answer_ids


def test_bos_that_is_also_eos_stays(tokenizers_by_kind):
    """OPT: one token opens every text and closes answers."""
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizers_by_kind["bos_is_eos"], "Question:", [" milk"], 99)
    assert prompt_ids[0] == answer_ids[-1] == EOS
    assert (prompt_ids + answer_ids).count(EOS) == 2
    assert tokenize_example(tokenizers_by_kind["bos_is_eos"], "", [" milk"], 99)[0] == [EOS]


def test_a_closing_token_that_is_also_bos_is_no_part_of_the_prompt(tokenizers_by_kind):
    """One token opens and closes every text: the prompt keeps the first and loses the last."""
    tokenizer = tokenizers_by_kind["bos_is_eos_closing"]
    prompt_ids, (answer_ids,), _ = tokenize_example(tokenizer, "Question:", [" milk"], 99)
    assert prompt_ids + answer_ids == tokenizer("Question: milk").input_ids


def test_every_candidate_shares_the_prompt(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["bos"]
    prompt, _ = _texts("plain")
    answers = [" a shed", " the fridge", " answer1", "\n"]
    together = tokenize_example(tokenizer, prompt, answers, 9999)
    apart = [tokenize_example(tokenizer, prompt, [answer], 9999) for answer in answers]
    assert together == (apart[0][0], [answer_ids for _, (answer_ids,), _ in apart], False)


# --- too long ---


def _whole(tokenizer, answers):
    return tokenize_example(tokenizer, "Question: " + "cat? " * 20 + "Answer:", answers, 9999)


@pytest.mark.parametrize(
    ("kind", "max_length", "prompt", "shortened"),
    [
        ("words", 6, [3, 4, 5], False),
        ("words", 5, [4, 5], True),
        ("words", 4, [5], True),
        ("words_bos", 7, [BOS, 3, 4, 5], False),
        ("words_bos", 6, [BOS, 4, 5], True),
        ("words_bos", 5, [BOS, 5], True),
    ],
)
def test_truncation_by_hand(kind, max_length, prompt, shortened, tokenizers_by_kind):
    """The longest candidate has three tokens; what it leaves is the prompt's, BOS first and then the end of the text."""
    answers = [" yes", " no never"]
    result = tokenize_example(tokenizers_by_kind[kind], "Question: cat?\nAnswer:", answers, max_length)
    assert result == (prompt, [[6, EOS], [7, 8, EOS]], shortened)


@pytest.mark.parametrize(("kind", "max_length"), [("words", 3), ("words_bos", 4), ("words", 1)])
def test_an_answer_too_long_for_any_prompt_raises(kind, max_length, tokenizers_by_kind):
    with pytest.raises(ValueError, match=f"an answer has 3 tokens.*max_length {max_length}$"):
        tokenize_example(tokenizers_by_kind[kind], "Question: cat?\nAnswer:", [" yes", " no never"], max_length)


@pytest.mark.parametrize("kind", ["plain", "bos", "closing", "pieces", "bos_is_eos"])
def test_truncation_cuts_after_bos_and_never_the_answer(kind, tokenizers_by_kind):
    tokenizer = tokenizers_by_kind[kind]
    candidates = [" yes", " the correct answer is answer2"]
    prompt, answers, _ = _whole(tokenizer, candidates)
    longest = max(map(len, answers))
    bos = 0 if kind == "plain" else 1
    for max_length in range(longest + bos + 1, longest + len(prompt)):
        cut, same, shortened = tokenize_example(
            tokenizer, "Question: " + "cat? " * 20 + "Answer:", candidates, max_length
        )
        assert (same, shortened) == (answers, True)
        assert len(cut) + longest == max_length
        assert cut[:bos] == prompt[:bos]
        assert cut[bos:] == prompt[len(prompt) - len(cut) + bos :]


def test_an_empty_prompt(tokenizers_by_kind):
    assert tokenize_example(tokenizers_by_kind["words"], "", [" yes"], 2) == ([], [[6, EOS]], False)
    with pytest.raises(ValueError, match=r"an answer has 2 tokens.*max_length 1$"):
        tokenize_example(tokenizers_by_kind["words"], "", [" yes"], 1)


# --- chat templates ---

CHATS = {  # by hand: the prompt for "Where?", and what closes an answer
    "turn_ends_in_eos": ("<im_start>user\nWhere?<eos>\n<im_start>assistant\n", "<eos>"),
    "gemma": (
        "<bos><start_of_turn>user\nWhere?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn><eos>",
    ),
    "llama3": (
        "<bos><start_header>user<end_header>\n\nWhere?<eot><start_header>assistant<end_header>\n\n",
        "<eot><eos>",
    ),
    "llama2": ("<bos>[INST] Where? [/INST]", "<eos>"),
    "turns_without_names": ("Where?<eos>", "<eos>"),
    "turn_ends_in_text": ("user: Where?\n", "<eos>"),
}


@pytest.fixture
def chat_batch(make_data, write, chat_tokenizers):
    """``chat_batch(kind, train_on)``: ROW by its right answer's text, as the validation loader gives it."""

    def build(kind, train_on="response", question="Where?"):
        row = ROW | {"instruction": ROW["instruction"].replace("Where is milk kept?", question)}
        sources = [write("row.json", [row])]
        settings = {
            "template": "chat",
            "answer_format": "content",
            "train_on": train_on,
            "validation": sources,
        }
        data = make_data(tokenizer=chat_tokenizers[kind], stage="validate", **settings)
        (batch,) = data.val_dataloader()
        return batch

    return build


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_prompt_is_the_tokenizers_own(kind, chat_batch, chat_tokenizers):
    tokenizer, batch = chat_tokenizers[kind], chat_batch(kind)
    prompt = batch["input_ids"][0][~batch["response_mask"][0]].tolist()
    turns = [{"role": "user", "content": "Where?"}]
    own = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert prompt == own["input_ids"]
    assert tokenizer.decode(prompt) == CHATS[kind][0]


@pytest.mark.parametrize("kind", CHATS)
def test_a_template_that_writes_bos_gets_no_second_one(kind, chat_batch, chat_tokenizers):
    """Every one of these tokenizers but the first would add BOS to a text, whether it has one or not."""
    tokenizer = chat_tokenizers[kind]
    assert (tokenizer(CHATS[kind][0]).input_ids[0] == BOS) is (kind != "turn_ends_in_eos")
    ids = chat_batch(kind)["input_ids"][0].tolist()
    assert ids.count(BOS) == CHATS[kind][0].count("<bos>")


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_answer_closes_its_turn_and_the_text(kind, chat_batch, chat_tokenizers):
    prompt, closing = CHATS[kind]
    answer = f"{' ' * (kind == 'llama2')}fridge{closing}"  # its template puts a space there
    for train_on, targets in (("response", answer), ("all", f"{prompt}{answer}")):
        batch = chat_batch(kind, train_on)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert chat_tokenizers[kind].decode(ids[batch["response_mask"][0]]) == answer
        wanted = ids[labels != X] if train_on == "response" else torch.cat([ids[:1], ids[labels != X]])
        assert chat_tokenizers[kind].decode(wanted) == targets
        assert torch.equal(labels[labels != X], ids[labels != X])
        assert (
            batch["step_supervised_tokens"] == int((labels != X).sum()) == len(wanted) - (train_on == "all")
        )


def test_every_candidate_closes_its_turn(make_data, write, chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    data = make_data(tokenizer=tokenizer, template="chat", test=[write("row.json", [ROW])], stage="test")
    texts = [tokenizer.decode(ids) for ids in data.tables["test"][0]["answers"]]
    assert texts == [f"the correct answer is answer{n}<end_of_turn><eos>" for n in (1, 2)]


@pytest.mark.parametrize("kind", ["bos", "pieces"])
def test_a_chat_answer_continues_the_prompt(kind, tokenizers_by_kind):
    """Alone, a text of ``pieces`` begins with a space that is not there."""
    tokenizer, prompt = tokenizers_by_kind[kind], "<bos>Question: Where? Answer:\n"
    prompt_ids, (answer_ids,), _ = tokenize_example(
        tokenizer, prompt, ["fridge"], 99, special_tokens=False, answer_suffix="<unk>"
    )
    whole = tokenizer(f"{prompt}fridge<unk>", add_special_tokens=False).input_ids
    assert prompt_ids + answer_ids == [*whole, EOS]
    assert answer_ids[-2:] == [2, EOS]  # <unk>, which ends the turn here, and EOS


def test_a_chat_prompt_is_shortened_behind_its_bos(make_data, write, chat_tokenizers):
    tokenizer, sources = chat_tokenizers["llama3"], [write("row.json", [ROW])]
    data = make_data(tokenizer=tokenizer, template="chat", test=sources, stage="test", max_length=40)
    (row,) = data.tables["test"]
    assert row["truncated"]
    assert max(row["lengths"]) == 40
    assert row["prompt"][0] == BOS
    assert tokenizer.decode(row["prompt"]).endswith("<start_header>assistant<end_header>\n\n")


# --- keys: which rows ask the same ---


def test_a_key_is_16_hex_digits_and_sees_neither_case_nor_white_space():
    key = Example("Where is  milk?\n", ["Here", " there"], 0, "a").key
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert Example(" where IS milk?", ["here ", "There"], 1, "b").key == key  # nor gold and task


@pytest.mark.parametrize(
    "other",
    [
        Example("Where is silk?", ["here", "there"], 0, "a"),
        Example("Where is milk ?", ["here", "there"], 0, "a"),
        Example("Whereis milk?", ["here", "there"], 0, "a"),
        Example("Where is milk?", ["here", "there", "nowhere"], 0, "a"),
        Example("Where is milk?", ["there", "here"], 0, "a"),
        Example("Where is milk?", ["here there"], 0, "a"),
        Example("Where is milk? here", ["there"], 0, "a"),
    ],
    ids=repr,
)
def test_another_question_has_another_key(other):
    assert other.key != Example("Where is milk?", ["here", "there"], 0, "a").key


def test_an_identity_takes_the_place_of_prompt_and_answers():
    plain = Example("Question: Where?", [" here"], 0, "a", identity="Where? 1: here")
    assert (
        Example("### Where?", ["answer1", "answer2"], 1, "b", identity="WHERE?  1: here\n").key == plain.key
    )
    assert Example("Question: Where?", [" here"], 0, "a", identity="Where? 1: there").key != plain.key


def test_a_row_has_one_key_whatever_the_template_and_the_answer_format(
    make_data, write, rows, chat_tokenizers
):
    shouted = [row | {"instruction": row["instruction"].replace("Which of", " WHICH  of")} for row in rows(4)]
    sources = [write("rows.json", rows(4)), write("again.json", shouted)]
    found = [
        [
            example.key
            for example in make_data(
                tokenizer=chat_tokenizers["gemma"],
                template=template,
                answer_format=answer_format,
                test=sources,
            ).examples("test")
        ]
        for template in ("alpaca", "plain", "chat")
        for answer_format in ("label", "content")
    ]
    assert all(keys == found[0] for keys in found)
    assert found[0][:4] == found[0][4:]
    assert len(set(found[0])) == 4


# --- a real tokenizer ---


def test_smollm2_boundary_labels_and_eos(smollm2):
    assert smollm2.pad_token_id == smollm2.eos_token_id
    for template in ("alpaca", "plain"):
        prompt, answer = _texts(template)
        prompt_ids, (answer_ids,), _ = tokenize_example(smollm2, prompt, [answer], 9999)
        assert prompt_ids + answer_ids == [*smollm2(prompt + answer).input_ids, smollm2.eos_token_id]
        rows = [
            TokenSequence(prompt_ids, answer_ids, example_id=0),
            TokenSequence(prompt_ids, [7], example_id=1),
        ]
        labels = collate(rows, pad_id=smollm2.pad_token_id, train_on="response")["labels"]
        assert smollm2.decode(labels[0][labels[0] != X]) == answer + smollm2.eos_token
        assert labels[1][labels[1] != X].tolist() == [7]


def test_smollm2_through_the_data_module(smollm2, make_data, write, rows):
    data = make_data(
        template="plain", answer_format="content", tokenizer=smollm2, test=[write("test.json", rows(3))]
    )
    data.setup("test")
    found = {}
    (loader,) = data.test_dataloader()
    for batch in loader:
        for ids, mask, example, answer in zip(
            batch["input_ids"], batch["response_mask"], batch["example_ids"], batch["answer_ids"], strict=True
        ):
            found[int(example), int(answer)] = smollm2.decode(ids[mask])
    texts = {
        (0, 0): "thing 0",
        (0, 1): "thing 0",
        (1, 0): "thing 1",
        (1, 1): "very thing 1",
        (1, 2): "very very thing 1",
    }
    texts |= {(2, k): "very very " * k + "thing 2" for k in range(4)}
    assert found == {key: f" {text}<|im_end|>" for key, text in texts.items()}


def test_smollm2_chat(smollm2, make_data, write):
    """Its template opens with a system turn of its own, and a turn ends in what is EOS too."""
    data = make_data(
        template="chat",
        answer_format="content",
        tokenizer=smollm2,
        test=[write("row.json", [ROW])],
        stage="test",
    )
    (row,) = data.tables["test"]
    turns = [{"role": "user", "content": "Where is milk kept?"}]
    own = smollm2.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
    assert row["prompt"] == own["input_ids"]
    assert smollm2.decode(row["prompt"]).endswith(
        "<|im_start|>user\nWhere is milk kept?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [smollm2.decode(ids) for ids in row["answers"]] == ["shed<|im_end|>", "fridge<|im_end|>"]


@pytest.mark.parametrize("template", ["alpaca", "plain"])
@pytest.mark.parametrize("answer_format", ["label", "content"])
def test_smollm2_continues_real_prompts(template, answer_format, smollm2, real_data, make_data):
    """Ten real rows of every task: prompt and answer are the running text's ids, so no token spans the boundary."""
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
