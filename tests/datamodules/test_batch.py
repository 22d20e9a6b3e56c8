"""The batches of every task and template: labels, response mask and special tokens, decoded."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from gatera_lightning.datamodules import (
    CommonsenseDataModule,
    DialogueDataModule,
    InstructionDataModule,
    MathDataModule,
)
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.prompts.templates import Template

BOS = 1
X = IGNORE_INDEX
QUESTION = {
    "instruction": "Please choose the correct answer to the question: Where is milk kept?\n\n"
    "Answer1: shed Answer2: fridge\n\nAnswer format: answer1/answer2",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


EXPECTED = {  # (template, answer_format): prompt, answer
    ("alpaca", "label"): (ALPACA.format(QUESTION["instruction"]), "the correct answer is answer2"),
    ("plain", "label"): (f"Question: {QUESTION['instruction']}\nAnswer:", " the correct answer is answer2"),
    ("alpaca", "content"): (ALPACA.format("Where is milk kept?"), "fridge"),
    ("plain", "content"): ("Question: Where is milk kept?\nAnswer:", " fridge"),
}


@pytest.mark.parametrize("kind", ["bos", "closing", "bos_is_eos"])
@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(("template", "answer_format"), EXPECTED)
def test_labels_decode_to_supervised_text(
    template, answer_format, train_on, kind, make_data, write, tokenizers_by_kind
):
    tokenizer = tokenizers_by_kind[kind]
    sources = [write("row.json", [QUESTION])]
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


# --- response mask ---

# Records of a file, and the end of the prompt and the answer of each example.
QUESTIONS = [
    {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n"
        f"Answer1: {first} Answer2: {second}\n\nAnswer format: answer1/answer2",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    for question, first, second, answer in (
        ("Where is milk kept?", "in the fridge", "in the garden shed behind the house", "answer2"),
        ("Which of these is a color that the sky has at night?", "blue", "red", "answer1"),
        ("Why?", "so", "no", "answer2"),
    )
]


PROBLEMS = [
    {"question": "What is 48/2?", "answer": "Half of 48 is <<48/2=24>>24.\n#### 24"},
    {
        "query": "What is x + 1 where x is 2 and nothing else?",
        "response": "Add one to two.\nThe answer is: 3",
    },
    {"instruction": "Three and four?", "input": "", "output": "", "answer": "7.0"},
]


DIALOGUES = """1 your persona: i have a dog .
2 hi ?\thello !\t\tno .|hello !
3 pets ?\ta dog , and many more of them .\t\tno .|a dog , and many more of them .
1 your persona: i like cats .
2 hey\tso long .\t\tno .|so long .
"""


INSTRUCTIONS = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Sing something long for me.", "output": "La la\n\nla la la"},
]
CONVERSATIONS = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Good day."},
            {"role": "assistant", "content": "Hello there."},
            {"role": "user", "content": "Bye."},
            {"role": "assistant", "content": "Farewell, and come again!"},
        ]
    },
    {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It"}]},
]
TASKS = {
    "commonsense, content": (
        *(CommonsenseDataModule, {"answer_format": "content"}, "rows.json", QUESTIONS),
        [
            ("Where is milk kept?", "in the garden shed behind the house"),
            ("Which of these is a color that the sky has at night?", "blue"),
            ("Why?", "no"),
        ],
    ),
    "commonsense, label": (
        *(CommonsenseDataModule, {"answer_format": "label"}, "rows.json", QUESTIONS),
        [
            ("in the garden shed", "the correct answer is answer2"),
            ("at night?", "the correct answer is answer1"),
            ("Why?", "the correct answer is answer2"),
        ],
    ),
    "math, gsm8k": (
        *(MathDataModule, {"answer_style": "gsm8k"}, "rows.json", PROBLEMS),
        [
            ("48/2?", "Half of 48 is 24.\n#### 24"),
            ("nothing else?", "Add one to two.\n#### 3"),
            ("Three and four?", "#### 7"),
        ],
    ),
    "math, metamath": (
        *(MathDataModule, {"answer_style": "metamath"}, "rows.json", PROBLEMS),
        [
            ("48/2?", "Half of 48 is 24.\nThe answer is: 24"),
            ("nothing else?", "Add one to two.\nThe answer is: 3"),
            ("Three and four?", "The answer is: 7"),
        ],
    ),
    "dialogue": (
        *(DialogueDataModule, {}, "rows.txt", DIALOGUES),
        [
            ("i have a dog .", "hello !"),
            ("pets ?", "a dog , and many more of them ."),
            ("i like cats .", "so long ."),
        ],
    ),
    "own, instructions": (
        *(InstructionDataModule, {}, "rows.json", INSTRUCTIONS),
        [("1 2", "3"), ("Sing something long for me.", "La la\n\nla la la")],
    ),
    "own, chats": (
        *(InstructionDataModule, {}, "rows.json", CONVERSATIONS),
        [("Hello there.", "Farewell, and come again!"), ("Say it.", "It")],
    ),
}
KINDS = {  # (tokenizer, train_on) for each template; the response mask does not depend on train_on
    "alpaca": [("pieces", "response")],
    "plain": [("bos", "response"), ("bos", "all")],
    "chat": [
        ("llama3", "response"),
        ("gemma", "response"),
        ("turn_ends_in_eos", "response"),
        ("llama2", "response"),
    ],
}


CASES = [
    (task, template, *kind)
    for task in TASKS
    for template in get_args(Template)
    for kind in KINDS[template]
    if (task, template) != ("own, chats", "alpaca")  # alpaca has no place for several turns
]


@pytest.mark.parametrize(("task", "template", "kind", "train_on"), CASES)
def test_response_mask_covers_answer_and_eos(
    task, template, kind, train_on, tokenizers_by_kind, chat_tokenizers, write
):
    module, settings, name, rows, expected = TASKS[task]
    tokenizer = (chat_tokenizers if template == "chat" else tokenizers_by_kind)[kind]
    path = write(name, rows)
    data = module(
        **{"template": template, "train_on": train_on, "train": [path], "validation": [path], "test": [path]},
        **{"max_length": 512, "batch_size": len(expected), "group_by_length": False, **settings},
    )
    data.connect(tokenizer)
    data.trainer = SimpleNamespace(
        world_size=1, global_rank=0, is_global_zero=True, accumulate_grad_batches=1, limit_train_batches=1.0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["example_ids"].tolist()) == list(range(len(expected)))
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1  # otherwise nothing is padded
    for row, example in enumerate(batch["example_ids"].tolist()):
        asked, answer = expected[example]
        length, ids, response = (
            lengths[row],
            batch["input_ids"][row].tolist(),
            batch["response_mask"][row].tolist(),
        )
        begin = response.index(True)
        assert response == [begin <= i < length for i in range(len(ids))]
        assert ids[length - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[begin:length], skip_special_tokens=True).strip() == answer
        assert asked in tokenizer.decode(ids[:begin], skip_special_tokens=True)


# --- chat templates ---

CHATS = {  # the prompt for "Where?", and what ends an answer
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
    "turn_ends_in_text": ("user: Where?\nassistant:", "<eos>"),
}


@pytest.fixture
def chat_batch(make_data, write, chat_tokenizers):
    """``chat_batch(kind, train_on)``: QUESTION as validation batch, with the text of its answer."""

    def build(kind, train_on="response", question="Where?"):
        row = QUESTION | {"instruction": QUESTION["instruction"].replace("Where is milk kept?", question)}
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
def test_chat_prompt_matches_apply_chat_template(kind, chat_batch, chat_tokenizers):
    tokenizer, batch = chat_tokenizers[kind], chat_batch(kind)
    prompt = batch["input_ids"][0][~batch["response_mask"][0]].tolist()
    turns = [{"role": "user", "content": "Where?"}]
    own = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
    if kind != "turn_ends_in_text":  # has no generation prompt, so the opening is what precedes an answer
        assert prompt == own["input_ids"]
    assert tokenizer.decode(prompt) == CHATS[kind][0]


@pytest.mark.parametrize("kind", CHATS)
def test_chat_prompt_has_no_second_bos(kind, chat_batch, chat_tokenizers):
    """All these tokenizers but the first add BOS, even to a text that has one."""
    tokenizer = chat_tokenizers[kind]
    assert (tokenizer(CHATS[kind][0]).input_ids[0] == BOS) is (kind != "turn_ends_in_eos")
    ids = chat_batch(kind)["input_ids"][0].tolist()
    assert ids.count(BOS) == CHATS[kind][0].count("<bos>")


@pytest.mark.parametrize("kind", CHATS)
def test_chat_answer_ends_turn_and_text(kind, chat_batch, chat_tokenizers):
    prompt, closing = CHATS[kind]
    spaced = kind in ("llama2", "turn_ends_in_text")  # their templates write a space there
    answer = f"{' ' * spaced}fridge{closing}"
    for train_on, expected in (("response", answer), ("all", f"{prompt}{answer}")):
        batch = chat_batch(kind, train_on)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        assert chat_tokenizers[kind].decode(ids[batch["response_mask"][0]]) == answer
        wanted = ids[labels != X] if train_on == "response" else torch.cat([ids[:1], ids[labels != X]])
        assert chat_tokenizers[kind].decode(wanted) == expected
        assert torch.equal(labels[labels != X], ids[labels != X])
        assert (
            batch["step_supervised_tokens"] == int((labels != X).sum()) == len(wanted) - (train_on == "all")
        )


def test_chat_candidates_end_their_turn(make_data, write, chat_tokenizers):
    tokenizer = chat_tokenizers["gemma"]
    data = make_data(tokenizer=tokenizer, template="chat", test=[write("row.json", [QUESTION])], stage="test")
    texts = [tokenizer.decode(ids) for ids in data.tables["test"][0]["answers"]]
    assert texts == [f"the correct answer is answer{n}<end_of_turn><eos>" for n in (1, 2)]


def test_chat_prompt_is_truncated_after_bos(make_data, write, chat_tokenizers):
    tokenizer, sources = chat_tokenizers["llama3"], [write("row.json", [QUESTION])]
    data = make_data(tokenizer=tokenizer, template="chat", test=sources, stage="test", max_length=40)
    (row,) = data.tables["test"]
    assert row["truncated"]
    assert max(row["lengths"]) == 40
    assert row["prompt"][0] == BOS
    assert tokenizer.decode(row["prompt"]).endswith("<start_header>assistant<end_header>\n\n")


def test_smollm2_candidates(smollm2, make_data, write, rows):
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
    """The template starts with a system turn, and turns end in EOS."""
    data = make_data(
        template="chat",
        answer_format="content",
        tokenizer=smollm2,
        test=[write("row.json", [QUESTION])],
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
