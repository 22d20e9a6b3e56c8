"""Dialogues of ConvAI2 in both formats, on real files as well, and errors in malformed ones."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from gatera_lightning.datamodules.tasks.convai2_files import (
    Dialogue,
    Turn,
    parse_persona_chat,
    read_parlai,
    read_persona_chat,
)
from gatera_lightning.errors import ConfigError

TEXT = """\
1 your persona: i have a dog .
2 your persona: i bake bread.
3 hi , how are you ?\tgreat ! i am walking my dog .\t\tno .|i like tea|great ! i am walking my dog .
4 nice\tdo you bake ?\t\tblue|do you bake ?
1 hello\thi there\t\thi there
1 your persona: i am 5 .
2 2 plus 2 ?\t4\t\t5|4
"""
DIALOGUES = [
    Dialogue(
        1,
        ("i have a dog .", "i bake bread."),
        (
            Turn(
                "hi , how are you ?",
                "great ! i am walking my dog .",
                ("no .", "i like tea", "great ! i am walking my dog ."),
            ),
            Turn("nice", "do you bake ?", ("blue", "do you bake ?")),
        ),
    ),
    Dialogue(2, (), (Turn("hello", "hi there", ("hi there",)),)),
    Dialogue(3, ("i am 5 .",), (Turn("2 plus 2 ?", "4", ("5", "4")),)),
]
ENTRIES = [
    {
        "personality": ["i have a dog .", "i bake bread."],
        "utterances": [
            {
                "candidates": ["no .", "i like tea", "great ! i am walking my dog ."],
                "history": ["hi , how are you ?"],
            },
            {
                "candidates": ["blue", "do you bake ?"],
                "history": ["hi , how are you ?", "great ! i am walking my dog .", "nice"],
            },
        ],
    },
    {"personality": [], "utterances": [{"candidates": ["hi there"], "history": ["hello"]}]},
    {"personality": ["i am 5 ."], "utterances": [{"candidates": ["5", "4"], "history": ["2 plus 2 ?"]}]},
]


@pytest.fixture(scope="session")
def real_file():
    """A part of ParlAI's file."""
    if "GATERA_DATA" not in os.environ:
        pytest.skip("GATERA_DATA is not set: the folder of the published data sets")
    return Path(os.environ["GATERA_DATA"]) / "dialogue" / "convai2" / "valid_self_original.shared.txt"


# --- text files of ParlAI ---


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.removesuffix("\n"),
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\n\n"),
        "\n" + TEXT,
        TEXT.replace("|", " | "),
    ],
)
def test_read_parlai(text, write):
    assert list(read_parlai(write("a.txt", text))) == DIALOGUES


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b"])
def test_lines_end_at_newlines_only(separator, write):
    path = write("a.txt", f"1 one{separator}two\tthree\t\tfour{separator}five|three\n")
    (dialogue,) = read_parlai(path)
    assert dialogue.turns == (Turn(f"one{separator}two", "three", (f"four{separator}five", "three")),)


def test_dialogue_may_have_more_than_nine_lines(write):
    numbers = range(1, 13)
    text = "".join(f"{n} p{n}\tr{n}\t\tx|r{n}\n" for n in numbers) * 2
    replies = [[turn.reply for turn in dialogue.turns] for dialogue in read_parlai(write("a.txt", text))]
    assert replies == [[f"r{n}" for n in numbers]] * 2


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_file_without_dialogues(text, write):
    assert list(read_parlai(write("a.txt", text))) == []


def test_real_dialogues_are_read_completely(real_file):
    """Writing the dialogues gives the file again."""
    lines, candidate_counts = [], Counter()
    for number, dialogue in enumerate(read_parlai(str(real_file)), 1):
        assert dialogue.number == number
        texts = [f"your persona: {sentence}" for sentence in dialogue.persona]
        texts += [f"{turn.partner}\t{turn.reply}\t\t{'|'.join(turn.candidates)}" for turn in dialogue.turns]
        lines += [f"{line_number} {text}" for line_number, text in enumerate(texts, 1)]
        candidate_counts.update(len(turn.candidates) for turn in dialogue.turns)
        assert len(dialogue.persona) in (4, 5)
    assert "\n".join(lines) + "\n" == real_file.read_text(encoding="utf-8")
    assert candidate_counts == {20: 5466}
    assert number == 702


GOOD = "1 your persona: me .\n2 hello\thi\t\tno|hi\n"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (f"{GOOD}4 how ?\tso\t\tso\n", 3, "a line that starts with 1 or 3 and a space, found '4 how"),
        (f"{GOOD}2 how ?\tso\t\tso\n", 3, "a line that starts with 1 or 3 and a space"),
        (f"{GOOD}03 how ?\tso\t\tso\n", 3, "a line that starts with 1 or 3"),
        (f"{GOOD}how ?\tso\t\tso\n", 3, "a line that starts with 1 or 3"),
        ("2 your persona: me .\n", 1, "a line that starts with 1 and a space"),
        (
            f"{GOOD}\n3 how ?\tso\n",
            4,
            r"4 tab-separated fields, 'partner\treply\t\tcandidate|…|reply', not 2",
        ),
        (f"{GOOD}3 how ?\tso\tso\n", 3, "4 tab-separated fields"),
        (f"{GOOD}3 how ?\tso\t\tso\tmore\n", 3, "4 tab-separated fields, .*not 5"),
        (f"{GOOD}3 how ?\tso\t\tso|no\n", 3, "the reply as the last candidate, which is 'no'"),
        (f"{GOOD}3 how ?\tso\t\t\n", 3, "the reply as the last candidate, which is ''"),
        (f"{GOOD}3  \tso\t\tso\n", 3, "a text of the partner and a reply, but one of them is empty"),
        (f"{GOOD}3 how ?\t\t\tso\n", 3, "a text of the partner and a reply"),
        (f"{GOOD}3 how ?\n", 3, r"a turn, '3 partner\treply\t\tcandidate|…|reply', found '3 how ?'"),
        (f"{GOOD}3 your persona: too late .\n", 3, "a turn, '3 partner"),
        (f"{GOOD}1 partner's persona: you .\n", 3, "'1 your persona: …' or a turn, '1 partner"),
        (f"{GOOD}1\n", 3, "'1 your persona: …' or a turn"),
        (
            f"1 your persona: me .\n{GOOD}",
            2,
            "a turn before the next dialogue, found '1 your persona: me .'",
        ),
        (f"{GOOD}1 your persona: alone .", 3, "a turn, found the end of the file"),
    ],
)
def test_malformed_line(text, line, expected, write):
    path = write("bad.txt", text)
    with pytest.raises(ConfigError) as caught:
        list(read_parlai(path))
    head, _, tail = expected.partition(".*")
    assert str(caught.value).startswith(f"{path}, line {line}: expected {head}")
    assert tail in str(caught.value)


def test_dialogues_before_a_malformed_line_are_read(write):
    dialogues = read_parlai(write("bad.txt", GOOD + GOOD + "nonsense"))
    assert next(dialogues).turns == (Turn("hello", "hi", ("no", "hi")),)


# --- JSON of TransferTransfo ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", {"train": [], "valid": ENTRIES}),
        ("a.json", ENTRIES),
        ("a.jsonl", "\n".join(map(json.dumps, ENTRIES))),
    ],
)
def test_read_persona_chat(name, content, write):
    assert list(read_persona_chat(write(name, content), "valid")) == DIALOGUES


def test_sections_are_read_separately(write):
    path = write("a.json", {"train": ENTRIES[:1], "valid": ENTRIES[1:]})
    assert [len(list(read_persona_chat(path, section))) for section in ("train", "valid")] == [1, 2]


def test_real_dialogues_are_the_same_in_both_formats(real_file):
    dialogues = list(read_parlai(str(real_file)))[:60]
    entries = []
    for dialogue in dialogues:
        history, utterances = [], []
        for turn in dialogue.turns:
            history.append(turn.partner)
            utterances.append({"candidates": list(turn.candidates), "history": list(history)})
            history.append(turn.reply)
        entry = {"personality": list(dialogue.persona), "utterances": utterances}
        entries.append((f"entry {dialogue.number}", entry))
    assert list(parse_persona_chat(entries)) == dialogues


def entry_with(**utterance):
    return {
        "personality": ["me ."],
        "utterances": [{"candidates": ["no", "hi"], "history": ["hello"]} | utterance],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"valid": ENTRIES}, r"bad\.json: expected a field 'train' with dialogues, found valid$"),
        ({}, r"bad\.json: expected a field 'train' with dialogues, found no field$"),
        ({"train": {}}, r"bad\.json, train: expected a list of dialogues, found dict$"),
        ('"text"', r"bad\.json: expected a list of dialogues, found str$"),
        ('{"train": [}', r"bad\.json: not valid JSON .*line 1"),
        (
            {"train": [ENTRIES[0], "x"]},
            r"bad\.json, train, row 2: expected a field 'personality' with a list$",
        ),
        ([{"personality": []}], r"bad\.json, row 1: expected a field 'utterances' with a list$"),
        ([{"personality": "me .", "utterances": []}], "row 1: expected a field 'personality' with a list$"),
        (
            [entry_with() | {"personality": ["me .", 3]}],
            r"row 1: field 'personality': expected sentences, found \['me \.', 3\]$",
        ),
        ([entry_with() | {"personality": [" "]}], "row 1: field 'personality': expected sentences"),
        ([entry_with() | {"utterances": []}], "row 1: field 'utterances': expected at least one$"),
        (
            [entry_with() | {"utterances": ["hi"]}],
            "row 1, utterance 1: expected fields 'history' and 'candidates'$",
        ),
        (
            [entry_with(history=["a", "b"])],
            "row 1, utterance 1: field 'history': expected a list of 1 texts$",
        ),
        ([entry_with(history=[])], "utterance 1: field 'history': expected a list of 1 texts$"),
        ([entry_with(history=None)], "utterance 1: field 'history'"),
        ([entry_with(candidates=[])], "utterance 1: field 'candidates': expected a list of texts$"),
        ([entry_with(candidates="hi")], "utterance 1: field 'candidates'"),
        ([entry_with(candidates=["hi", ""])], "utterance 1: field 'candidates'"),
        (
            [{"personality": [], "utterances": [ENTRIES[1]["utterances"][0]] * 2}],
            "row 1, utterance 2: field 'history': expected a list of 3 texts$",
        ),
    ],
)
def test_malformed_json(content, message, write):
    with pytest.raises(ConfigError, match=message):
        list(read_persona_chat(write("bad.json", content), "train"))
