"""docs/reference/rows.md shows every file in examples/rows/, and every row is read and rendered."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from gatera_lightning.datamodules import InstructionDataModule

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "examples" / "rows"
PAGE = (ROOT / "docs" / "reference" / "rows.md").read_text(encoding="utf-8")
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SEA = "<user>Name a sea.<|eos|><assistant>⟦The Baltic."
WEATHER = json.loads((ROWS / "tools.jsonl").read_text(encoding="utf-8").splitlines()[0])["tools"]
TOOLS = f"<tools>{json.dumps(WEATHER)}</tools>"
CALL = '<call>{"name": "weather", "arguments": {"city": "%s"}}</call>'
SUM = "<user>What is 2 + 3?<|eos|><assistant>⟦"
EXPECTED = {  # the prompt and, after ⟦, the response
    "instructions.jsonl": [
        "<user>Translate into French.\n\ngood morning<|eos|><assistant>⟦bonjour",
        f"{SUM}5",
    ],
    "instructions.csv": ["<user>Translate into French.\n\ngood morning<|eos|><assistant>⟦bonjour", SEA],
    "history.jsonl": [
        "<system>Be brief.<|eos|><user>Name a sea.<|eos|><assistant>The Baltic.<|eos|>"
        "<user>Another one?<|eos|><assistant>⟦The Aral Sea."
    ],
    "messages.jsonl": [
        f"<system>Be brief.<|eos|>{SEA}",
        "<system>Be brief.<|eos|><user>Name a river.<|eos|><assistant>⟦The Elbe.",
    ],
    "sharegpt.jsonl": [f"<system>Be brief.<|eos|>{SEA}"],
    "content_parts.jsonl": [SEA],
    "json_text.csv": [SEA],
    "assistant_first.jsonl": [
        "<assistant>Welcome! What may I bring?<|eos|><user>Tea.<|eos|><assistant>⟦One tea, coming."
    ],
    "weights.jsonl": [
        "<user>Name a sea.<|eos|><assistant>The Elbe.<|eos|><user>That is a river.<|eos|>"
        "<assistant>⟦The Baltic."
    ],
    "reasoning.jsonl": [
        f"{SUM}<think>Two and three more.</think>5",
        f"{SUM}<think>\nTwo and three more.\n</think>\n\n5",
    ],
    "tools.jsonl": [
        f"{TOOLS}<user>How warm is it in Oslo?<|eos|><assistant>{CALL % 'Oslo'}<|eos|>"
        "<tool>21 °C<|eos|><assistant>⟦It is 21 °C.",
        f"{TOOLS}<user>And in Rome?<|eos|><assistant>⟦{CALL % 'Rome'}",
    ],
    "prompt_completion.jsonl": ["The largest sea is⟦ the Philippine Sea.", SEA],
    "text.jsonl": ["⟦The Baltic is a sea in the north of Europe.\n"],
}


def rows_of(name, text):
    """The rows in the text of a file, which may have line breaks within rows."""
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    rows, decoder = [], json.JSONDecoder()
    while text := text.strip():
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:]
    return rows


def test_page_shows_every_file():
    shown = re.findall(r"`examples/rows/(\S+)`\n\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    assert {name for name, _ in shown} == {path.name for path in ROWS.iterdir()} == EXPECTED.keys()
    for name, text in shown:
        assert rows_of(name, text) == rows_of(name, (ROWS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_are_read_and_rendered(name, chat_tokenizer):
    data = InstructionDataModule(
        template="chat", train_on="response", max_length=999, train=[str(ROWS / name)], validation=1
    )
    data.connect(chat_tokenizer)
    examples = list(data.examples("train"))
    assert [f"{example.prompt}⟦{example.answers[0]}" for example in examples] == EXPECTED[name]


@pytest.fixture(scope="module")
def chat_tokenizer():
    from tiny_backbone import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer
