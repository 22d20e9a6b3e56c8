"""Prompts of dialogues: their text in every template, and how they are truncated."""

import pytest
from dialogues import parlai_text

from gatera_lightning.datamodules.prompts.dialogue_prompts import DialoguePrompts

PERSONA = ["i have a dog .", "i bake ."]
HISTORY = ["hi ?", "hello !", "pets ?", "a dog .", "bye"]
LINES = [
    "Persona: i have a dog . i bake .",
    *("Partner: hi ?", "You: hello !", "Partner: pets ?", "You: a dog .", "Partner: bye"),
]
ABOUT = "Reply as the person of whom this is true: i have a dog . i bake ."


def render(
    template, history=HISTORY, tokenizer=None, *, persona=PERSONA, replies=("see you .",), max_length=9999
):
    return DialoguePrompts(template, tokenizer).render(persona, history, replies, max_length)


def test_plain_has_a_line_per_text(tokenizer):
    assert render("plain", tokenizer=tokenizer) == ("\n".join([*LINES, "You:"]), [" see you ."])
    prompt, _ = render("plain", ["hey"], tokenizer, persona=[])
    assert prompt == "Partner: hey\nYou:"


def test_alpaca_has_the_lines_of_plain_as_instruction(tokenizer):
    prompt, answers = render("alpaca", tokenizer=tokenizer)
    assert prompt.startswith("Below is an instruction")
    assert "\n".join(LINES) + "\n\n### Response:\n" in prompt
    assert answers == ["see you ."]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "turn_ends_in_eos",
            f"<im_start>system\n{ABOUT}<eos>\n<im_start>user\nhi ?<eos>\n<im_start>assistant\nhello !<eos>\n"
            "<im_start>user\npets ?<eos>\n<im_start>assistant\n",
        ),
        (
            "llama3",
            f"<bos><start_header>system<end_header>\n\n{ABOUT}<eot>"
            "<start_header>user<end_header>\n\nhi ?<eot>"
            "<start_header>assistant<end_header>\n\nhello !<eot><start_header>user<end_header>\n\npets ?<eot>"
            "<start_header>assistant<end_header>\n\n",
        ),
    ],
)
def test_chat_has_the_persona_as_system_message(kind, expected, chat_tokenizers):
    prompt = render("chat", HISTORY[:3], chat_tokenizers[kind], replies=["a dog ."])
    assert prompt == (expected, ["a dog ."])


def test_chat_puts_persona_into_first_message_without_system_role(tokenizer_without_system_message):
    prompt, _ = render("chat", HISTORY[:3], tokenizer_without_system_message)
    assert prompt == f"{ABOUT}\n\nhi ?<eos>hello !<eos>pets ?<eos>"
    prompt, _ = render("chat", HISTORY[2:3], tokenizer_without_system_message)
    assert prompt == f"{ABOUT}\n\npets ?<eos>"


def test_render_rejects_unknown_template(tokenizer):
    with pytest.raises(ValueError, match="unknown template None"):
        render(None, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        *((kind, template) for kind in ("spanning", "pieces", "closing") for template in ("plain", "alpaca")),
        *((kind, "chat") for kind in ("llama3", "gemma", "llama2", "turn_ends_in_eos")),
    ],
)
def test_oldest_turns_are_dropped_until_the_longest_reply_fits(
    kind, template, tokenizers_by_kind, chat_tokenizers, make_dialogue_data, write
):
    """The token table has the prompt with as many turns as fit, and truncates nothing."""
    turns = [(f"question {n} {'so ' * n}?", f"reply {n} .") for n in range(9)]
    settings = {
        "test": [write("a.txt", parlai_text((PERSONA, turns, ["no", "a long long long long reply", "yes"])))],
        "template": template,
        "tokenizer": (tokenizers_by_kind | chat_tokenizers)[kind],
        "stage": "test",
    }

    def table(**options):
        return make_dialogue_data(**settings, **options).tables["test"]

    by_turns = [table(max_history_turns=n, max_length=9999) for n in range(9)]
    needed = [[max(lengths) for lengths in table["lengths"]] for table in by_turns]  # [turns][example]
    longest, shortest = max(needed[8]), max(needed[0])
    for max_length in (longest, longest - 1, (shortest + longest) // 2, shortest):
        found = table(max_length=max_length)
        assert not any(found["truncated"])
        for example, row in enumerate(found):
            shown = max(n for n in range(example + 1) if needed[n][example] <= max_length)
            assert row["prompt"] == by_turns[shown][example]["prompt"]
            assert row["answers"] == by_turns[shown][example]["answers"]
    with pytest.raises(
        ValueError, match="turn 9: the persona, the partner's last text and a reply have more"
    ):
        table(max_length=shortest - 1)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_render_rejects_persona_that_does_not_fit(template, tokenizer, chat_tokenizers):
    tokenizer = chat_tokenizers["llama3"] if template == "chat" else tokenizer
    long_persona = ["i like " + "very " * 60 + "long walks ."]
    message = "the persona, the partner's last text and a reply have more than max_length 80 tokens"
    with pytest.raises(ValueError, match=message):
        render(template, tokenizer=tokenizer, persona=long_persona, max_length=80)
