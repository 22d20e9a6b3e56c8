"""Which tokens are the response: of every family and template, exactly those of the answer, its end included."""

from types import SimpleNamespace
from typing import get_args

import pytest

from gatera_lightning.datamodules import (
    CommonsenseDataModule,
    DialogueDataModule,
    InstructionDataModule,
    MathDataModule,
)
from gatera_lightning.datamodules.prompts.templates import Template

# Rows as a file holds them, and by hand the words of the prompt and the answer of each example that they make.
QUESTIONS = [
    {
        "instruction": f"Please choose the correct answer to the question: {question}\n\nAnswer1: {first} Answer2: {second}\n\n"
        "Answer format: answer1/answer2",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    for question, first, second, answer in (
        ("Where is milk kept?", "in the fridge", "in the garden shed behind the house", "answer2"),
        ("Which of these is a colour that the sky has at night?", "blue", "red", "answer1"),
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
CHATS = [
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

FAMILIES = {
    "commonsense, content": (
        *(CommonsenseDataModule, {"answer_format": "content"}, "rows.json", QUESTIONS),
        [
            ("Where is milk kept?", "in the garden shed behind the house"),
            ("Which of these is a colour that the sky has at night?", "blue"),
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
        *(InstructionDataModule, {}, "rows.json", CHATS),
        [("Hello there.", "Farewell, and come again!"), ("Say it.", "It")],
    ),
}
KINDS = {  # tokenizers by template, and what carries loss, which the response does not depend on
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
    (family, template, *kind)
    for family in FAMILIES
    for template in get_args(Template)
    for kind in KINDS[template]
    if (family, template) != ("own, chats", "alpaca")  # which has one turn
]


@pytest.mark.parametrize(("family", "template", "kind", "train_on"), CASES)
def test_the_response_is_the_answer(
    family, template, kind, train_on, tokenizers_by_kind, chat_tokenizers, write
):
    """Decoded, it is the answer's text; in front of it stands the whole prompt, behind it padding alone."""
    module, settings, name, rows, expected = FAMILIES[family]
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
    assert len(set(lengths)) > 1  # else nothing is padded
    for row, example in enumerate(batch["example_ids"].tolist()):
        asked, answer = expected[example]
        length, ids, response = (
            lengths[row],
            batch["input_ids"][row].tolist(),
            batch["response_mask"][row].tolist(),
        )
        begin = response.index(True)
        assert response == [begin <= place < length for place in range(len(ids))]
        assert ids[length - 1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[begin:length], skip_special_tokens=True).strip() == answer
        assert asked in tokenizer.decode(ids[:begin], skip_special_tokens=True)
