"""Dialogue rows: what a reply is asked with, what stays together, which candidates are kept, and hits@1 by hand."""

import logging
import math
import os
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_backbone import tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import BackboneConfig
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules import DialogueDataModule
from gatera_lightning.datamodules.tasks.convai2_files import read_parlai
from gatera_lightning.datamodules.tasks.personas import persona_ids
from gatera_lightning.errors import ConfigError

SAMPLES = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "smalltalk"


def _text(*dialogues):
    """ParlAI's text of ``(persona, turns, [other candidates])``."""
    lines = []
    for persona, turns, others in dialogues:
        texts = [f"your persona: {sentence}" for sentence in persona]
        texts += [f"{partner}\t{reply}\t\t{'|'.join([*others, reply])}" for partner, reply in turns]
        lines += [f"{place} {text}" for place, text in enumerate(texts, 1)]
    return "\n".join(lines) + "\n"


DOG = (
    ["i have a dog .", "i bake ."],
    [("hi ?", "hello !"), ("pets ?", "a dog ."), ("bye", "see you .")],
    ["no .", "blue"],
)
CAT = (["i like cats ."], [("hey", "hi .")], ["no .", "red"])


def _numbered(count, turns=3, sentences=4):
    """Dialogues of ``count`` personas, two each, one sentence of every persona being everybody's."""
    found = []
    for number in range(2 * count):
        persona = [f"i am {word} {number % count}" for word in ("one", "two", "three")[: sentences - 1]] + [
            "i like tea"
        ]
        found.append(
            (
                persona[number // count :],
                [(f"q{number} {t} ?", f"r{number} {t} .") for t in range(turns)],
                ["no"],
            )
        )
    return found


@pytest.fixture
def make_dialogue(tokenizer):
    """A connected data module, set up for a stage where one is given."""

    def build(*, tokenizer=tokenizer, stage=None, **settings):
        module = DialogueDataModule(
            **({"template": "plain", "train_on": "response", "max_length": 512} | settings)
        )
        module.connect(tokenizer)
        module.trainer = SimpleNamespace(
            world_size=1,
            global_rank=0,
            is_global_zero=True,
            accumulate_grad_batches=1,
            limit_train_batches=1.0,
        )
        if stage:
            module.setup(stage)
        return module

    return build


@pytest.fixture(scope="session")
def real_source():
    if "GATERA_DATA" not in os.environ:
        pytest.skip("GATERA_DATA is unset: it names the folder with the real rows")
    return "$GATERA_DATA/dialogue/convai2/valid_self_original.shared.txt"


# --- prompts ---


PLAIN = "Persona: i have a dog . i bake .\nPartner: hi ?\nYou: hello !\nPartner: pets ?\nYou: a dog .\nPartner: bye\nYou:"


def test_a_row_for_every_own_reply(make_dialogue, write):
    data = make_dialogue(train=[write("a.txt", _text(DOG, CAT))])
    found = list(data.examples("train"))
    assert [(example.prompt, example.answers) for example in found] == [
        ("Persona: i have a dog . i bake .\nPartner: hi ?\nYou:", [" hello !"]),
        (
            "Persona: i have a dog . i bake .\nPartner: hi ?\nYou: hello !\nPartner: pets ?\nYou:",
            [" a dog ."],
        ),
        (PLAIN, [" see you ."]),
        ("Persona: i like cats .\nPartner: hey\nYou:", [" hi ."]),
    ]
    assert {(example.gold, example.task, example.chat) for example in found} == {(0, "a", False)}


def test_an_instruction_has_the_same_lines(make_dialogue, write):
    data = make_dialogue(train=[write("a.txt", _text(DOG))], template="alpaca")
    last = list(data.examples("train"))[-1]
    assert last.prompt.startswith("Below is an instruction")
    assert PLAIN.removesuffix("\nYou:") + "\n\n### Response:\n" in last.prompt
    assert last.answers == ["see you ."]


def test_a_dialogue_without_persona(make_dialogue, write):
    (found,) = make_dialogue(train=[write("a.txt", _text(([], CAT[1], [])))]).examples("train")
    assert found.prompt == "Partner: hey\nYou:"


ABOUT = "Reply as the person of whom this is true: i have a dog . i bake ."
CHATS = {
    "turn_ends_in_eos": f"<im_start>system\n{ABOUT}<eos>\n<im_start>user\nhi ?<eos>\n<im_start>assistant\nhello !<eos>\n"
    "<im_start>user\npets ?<eos>\n<im_start>assistant\n",
    "llama3": f"<bos><start_header>system<end_header>\n\n{ABOUT}<eot><start_header>user<end_header>\n\nhi ?<eot>"
    "<start_header>assistant<end_header>\n\nhello !<eot><start_header>user<end_header>\n\npets ?<eot>"
    "<start_header>assistant<end_header>\n\n",
    "refuses_system": f"[{ABOUT}\n\nhi ?](hello !)[pets ?]",
    "drops_system": f"[{ABOUT}\n\nhi ?](hello !)[pets ?]",
}
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}SYSTEM{% endif %}{% if m.role == 'user' %}[{{ m.content }}]"
NO_SYSTEM += "{% elif m.role == 'assistant' %}({{ m.content }}){% endif %}{% endfor %}"


@pytest.fixture
def chatting(chat_tokenizers, monkeypatch):
    """``chatting(kind)``: a tokenizer of that kind; two have no use for a system message."""

    def tokenizer_of(kind):
        if not kind.endswith("system"):
            return chat_tokenizers[kind]
        found = chat_tokenizers["turn_ends_in_text"]
        refusal = "{{ raise_exception('no system') }}" if kind == "refuses_system" else ""
        monkeypatch.setattr(found, "chat_template", NO_SYSTEM.replace("SYSTEM", refusal))
        return found

    return tokenizer_of


@pytest.mark.parametrize("kind", CHATS)
def test_chat_has_the_persona_first_and_a_message_a_text(kind, chatting, make_dialogue, write):
    data = make_dialogue(train=[write("a.txt", _text(DOG))], template="chat", tokenizer=chatting(kind))
    second = list(data.examples("train"))[1]
    assert second.prompt == CHATS[kind]
    assert second.answers == ["a dog ."]
    assert second.chat


def test_chat_keeps_the_persona_when_turns_go(chatting, make_dialogue, write):
    for kind in ("llama3", "refuses_system"):
        source = [write("a.txt", _text(DOG))]
        data = make_dialogue(train=source, template="chat", tokenizer=chatting(kind), max_history_turns=0)
        for example in data.examples("train"):
            assert example.prompt.count(ABOUT) == 1
            assert "hello !" not in example.prompt


@pytest.mark.parametrize("kind", ["turn_ends_in_eos", "gemma", "llama3", "llama2"])
def test_chat_prompts_are_tokenised_as_written(kind, chat_tokenizers, make_dialogue, write):
    """BOS once, and the whole dialogue is the template's own text of it, up to where the answer begins."""
    tokenizer = chat_tokenizers[kind]
    source = [write("a.txt", _text(DOG))]
    data = make_dialogue(train=source, validation=source, template="chat", tokenizer=tokenizer, stage="fit")
    row, example = data.tables["train"][2], list(data.examples("train"))[2]
    assert row["prompt"] == tokenizer(example.prompt, add_special_tokens=False).input_ids
    assert row["prompt"].count(tokenizer.bos_token_id) == example.prompt.count("<bos>")
    assert tokenizer.decode(row["answers"][0]).strip().startswith("see you .")


def test_chat_without_a_template(make_dialogue):
    with pytest.raises(ConfigError, match="chat needs a tokenizer with a chat template"):
        make_dialogue(template="chat")


def test_a_template_is_needed(make_dialogue):
    with pytest.raises(ConfigError, match="turn 1: unknown template None"):
        next(make_dialogue(template=None).examples("train"))


def test_a_tokenizer_is_needed():
    with pytest.raises(RuntimeError, match="no tokenizer"):
        next(DialogueDataModule(template="plain", train_on="response").examples("train"))


# --- history ---


@pytest.mark.parametrize(("turns", "shown"), [(None, 2), (5, 2), (2, 2), (1, 1), (0, 0)])
def test_the_newest_turns_are_shown(turns, shown, make_dialogue, write):
    data = make_dialogue(train=[write("a.txt", _text(DOG))], max_history_turns=turns)
    last = list(data.examples("train"))[-1].prompt.split("\n")
    assert last == [PLAIN.split("\n")[0], *PLAIN.split("\n")[1:][4 - 2 * shown :]]


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        *((kind, template) for kind in ("spanning", "pieces", "closing") for template in ("plain", "alpaca")),
        *((kind, "chat") for kind in ("llama3", "gemma", "llama2", "turn_ends_in_eos")),
    ],
)
def test_whole_turns_go_until_the_longest_reply_fits(
    kind, template, tokenizers_by_kind, chat_tokenizers, make_dialogue, write
):
    """As many as must; the table has nothing left to shorten."""
    tokenizer = (tokenizers_by_kind | chat_tokenizers)[kind]
    turns = [(f"question {n} {'so ' * n}?", f"reply {n} .") for n in range(9)]
    source = [write("a.txt", _text((DOG[0], turns, ["no", "a long long long long reply", "yes"])))]
    settings = {"test": source, "template": template, "tokenizer": tokenizer, "stage": "test"}
    by_turns = [
        make_dialogue(**settings, max_history_turns=n, max_length=9999).tables["test"] for n in range(9)
    ]
    needed = [[max(lengths) for lengths in table["lengths"]] for table in by_turns]  # by turns shown and row
    longest, shortest = max(needed[8]), max(needed[0])
    for max_length in (longest, longest - 1, (shortest + longest) // 2, shortest):
        table = make_dialogue(**settings, max_length=max_length).tables["test"]
        assert not any(table["truncated"])
        for number, row in enumerate(table):
            shown = max(n for n in range(number + 1) if needed[n][number] <= max_length)
            assert row["prompt"] == by_turns[shown][number]["prompt"]
            assert row["answers"] == by_turns[shown][number]["answers"]
    with pytest.raises(ConfigError, match="turn 9: persona, the partner's last text and a reply"):
        make_dialogue(**settings, max_length=shortest - 1)


def test_what_cannot_fit_is_named(make_dialogue, write):
    path = write("a.txt", _text(CAT, (["i like " + "very " * 60 + "long walks ."], *CAT[1:])))
    with pytest.raises(ConfigError) as caught:
        make_dialogue(train=[path], max_length=80).setup("fit")
    assert str(caught.value).startswith(
        f"{path}, dialogue 2, turn 1: persona, the partner's last text and a reply have more"
    )
    assert "max_length 80" in str(caught.value)
    with pytest.raises(ConfigError, match=r"dialogue 1, turn 1: an answer has \d+ tokens, .* max_length 3"):
        list(make_dialogue(train=[path], max_length=3).examples("train"))


# --- candidates ---


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, {"train": 1, "validation": 1, "test": 3}),
        ({"rank_validation": True}, {"train": 1, "validation": 3, "test": 3}),
        ({"rank_validation": True, "validation": 1}, {"train": 3, "validation": 3, "test": 3}),
        ({"validation": 1}, {"train": 1, "validation": 1, "test": 3}),
    ],
)
def test_candidates_are_kept_where_they_are_ranked(settings, counts, make_dialogue, write):
    source = [write("a.txt", _text(DOG, CAT))]
    data = make_dialogue(**({"train": source, "validation": source, "test": source} | settings), stage="fit")
    data.setup("test")
    assert {split: set(map(len, data.tables[split]["labels"])) for split in counts} == {
        k: {n} for k, n in counts.items()
    }
    for table in data.tables.values():
        for row in table:
            assert row["labels"][row["gold"]] in {"hello !", "a dog .", "see you .", "hi ."}
    assert data.tables["test"]["labels"][1] == ["no .", "blue", "a dog ."]
    assert data.tables["test"]["gold"][:] == [2] * 4
    assert data.tables["test"]["characters"][3] == [4, 3, 4]


def test_a_reply_is_recognised_by_its_text(make_dialogue):
    data = make_dialogue()
    read = [data.parse_answer(text, ["no .", "a dog ."]).choice for text in (" A dog .\nno .", "cat", "no")]
    assert read == [1, None, 0]


def test_a_question_is_the_same_however_it_is_asked(make_dialogue, write):
    source, other = (
        write("a.txt", _text(DOG, CAT)),
        write("b.txt", _text((DOG[0], [*DOG[1][:1], ("pets ?", "none .")], []))),
    )
    settings = [{}, {"template": "alpaca"}, {"max_history_turns": 0}, {"max_length": 60}]
    keys = [
        [example.key for example in make_dialogue(train=[source], **one).examples("train")]
        for one in settings
    ]
    assert keys[0] == keys[1] == keys[2] == keys[3]
    assert len(set(keys[0])) == 4
    tested = [example.key for example in make_dialogue(test=[other]).examples("test")]
    assert tested[0] == keys[0][0]  # whatever the candidates
    assert tested[1] not in keys[0]  # another reply


# --- what stays together ---


def _dialogues_of(data, split):
    """The number in every question, which is its dialogue's."""
    texts = data.tokenizer.batch_decode(data.tables[split]["prompt"][:])
    return [int(text.rsplit("Partner: q", 1)[1].split()[0]) for text in texts]


@pytest.mark.parametrize("seed", range(4))
def test_held_out_dialogues_are_whole(seed, make_dialogue, write):
    data = make_dialogue(train=[write("a.txt", _text(*_numbered(5)))], validation=5, seed=seed, stage="fit")
    train, held_out = (_dialogues_of(data, split) for split in ("train", "validation"))
    assert len(held_out) == 6
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(list(range(10)) * 3)


@pytest.mark.parametrize("seed", range(4))
def test_held_out_personas_are_whole(seed, make_dialogue, write):
    """Dialogues n and n + 5 have two or three sentences in common, and one with all the others."""
    sources = [write("a.txt", _text(*_numbered(5)[:7])), write("b.txt", _text(*_numbered(5)[7:]))]
    data = make_dialogue(train=sources, validation=5, seed=seed, split_by="persona", stage="fit")
    train, held_out = (
        {number % 5 for number in _dialogues_of(data, split)} for split in ("train", "validation")
    )
    assert len(data.tables["validation"]) == 6
    assert not train & held_out
    assert train | held_out == set(range(5))


def test_dialogues_of_two_files_are_not_one(make_dialogue, write):
    sources = [write("a.txt", _text(CAT)), write("b.txt", _text(CAT))]
    assert len(set(example.group for example in make_dialogue(train=sources).examples("train"))) == 2


@pytest.mark.parametrize("split_by", ["dialogue", "persona"])
def test_one_group_cannot_be_halved(split_by, make_dialogue, write):
    dialogues = [DOG] if split_by == "dialogue" else [DOG, DOG]
    with pytest.raises(
        ConfigError, match=r"^data.validation: 1 held out of \d examples leaves none to train on, because"
    ):
        make_dialogue(train=[write("a.txt", _text(*dialogues))], validation=1, split_by=split_by, stage="fit")


@pytest.mark.parametrize(
    ("split_by", "part", "numbers"),
    [
        ("dialogue", "", range(10)),
        ("dialogue", "[:3]", range(3)),
        ("dialogue", "[3:]", range(3, 10)),
        ("dialogue", "[3:5]", [3, 4]),
        ("dialogue", "[8:99]", [8, 9]),
        ("persona", "[:3]", [0, 1, 2, 5, 6, 7]),
        ("persona", "[3:]", [3, 4, 8, 9]),
        ("persona", "[1:2]", [1, 6]),
        ("persona", "[:]", range(10)),
    ],
)
def test_a_slice_counts_dialogues_or_personas(split_by, part, numbers, make_dialogue, write):
    data = make_dialogue(test=[write("a.txt", _text(*_numbered(5))) + part], split_by=split_by, stage="test")
    assert _dialogues_of(data, "test") == [number for number in numbers for _ in range(3)]


@pytest.mark.parametrize("sources", [[], ["{}[99:]"], ["{}[2:2]"]])
def test_a_split_without_rows(sources, make_dialogue, write):
    path = write("a.txt", _text(DOG))
    with pytest.raises(ConfigError, match=r"^data\.test: the split is empty; give at least one example$"):
        make_dialogue(test=[source.format(path) for source in sources], stage="test")


def _leakage(make_dialogue, **settings):
    return [str(found) for found in make_dialogue(**settings, stage="fit").overlaps()]


def test_personas_on_both_sides_are_said(make_dialogue, write):
    path = write("a.txt", _text(*_numbered(5)))
    settings = {"train": [f"{path}[:3]"], "validation": [f"{path}[3:5]"], "test": [f"{path}[5:]"]}
    of_rows = [
        "train/validation overlap: none of 6 validation examples",
        "train/test overlap: none of 15 test examples",
    ]
    assert _leakage(make_dialogue, **settings) == of_rows
    other = write("b.txt", _text(*_numbered(5)[7:], CAT))
    lines = _leakage(make_dialogue, **(settings | {"split_by": "persona", "test": [other]}))
    assert lines[-2] == "leakage: none of the 4 validation dialogues has a persona that is trained on"
    assert lines[-1].startswith(
        "leakage: 1 of 4 test dialogues have a persona that is trained on (numbers from 0: 0)."
    )


@pytest.mark.parametrize("seed", range(3))
def test_slices_and_held_out_rows_share_no_persona(seed, make_dialogue, write):
    path = write("a.txt", _text(*_numbered(6)))
    settings = {
        "train": [f"{path}[:4]"],
        "validation": 4,
        "test": [f"{path}[4:]"],
        "split_by": "persona",
        "seed": seed,
    }
    lines = _leakage(make_dialogue, **settings)
    assert lines[2:] == [
        "leakage: none of the 2 validation dialogues has a persona that is trained on",
        "leakage: none of the 4 test dialogues has a persona that is trained on",
    ]


def test_leakage_warns_only_where_there_is_some(make_dialogue, write, caplog):
    path = write("a.txt", _text(*_numbered(5)))
    with caplog.at_level(logging.INFO, "gatera_lightning.datamodules.base"):
        make_dialogue(
            train=[f"{path}[:4]"], validation=3, test=[f"{path}[4:]"], split_by="persona", stage="fit"
        )
        make_dialogue(train=[path], validation=3, test=[path], split_by="persona", stage="fit")
    levels = [record.levelname for record in caplog.records if "persona" in record.getMessage()]
    assert levels == ["INFO", "INFO", "INFO", "WARNING"]


def test_test_dialogues_that_cannot_be_read_are_said_once(make_dialogue, write):
    path = write("a.txt", _text(*_numbered(3)))
    lines = _leakage(
        make_dialogue, train=[path], validation=2, test=[write("bad.txt", "x")], split_by="persona"
    )
    assert len(lines) == 3
    assert "cannot be read here" in lines[1]
    assert "validation dialogues" in lines[2]


# --- sources ---


def test_the_sample(make_dialogue):
    data = make_dialogue(split_by="persona", stage="fit")
    data.setup("test")
    assert data.problems("fit") == data.problems("test") == []
    assert {split: len(table) for split, table in data.tables.items()} == {
        "train": 85,
        "validation": 24,
        "test": 32,
    }
    assert set(data.tables["test"]["task"]) == {"smalltalk"}
    assert [found.rows for found in data.overlaps()] == [()] * 4
    for split, count in (("train", 24), ("validation", 6), ("test", 8)):
        dialogues = list(read_parlai(str(SAMPLES / f"{split}.txt")))
        assert len(dialogues) == count
        replies = {turn.reply for dialogue in dialogues for turn in dialogue.turns}
        for dialogue in dialogues:
            own = {turn.reply for turn in dialogue.turns}
            for turn in dialogue.turns:
                assert len(set(turn.candidates)) == len(turn.candidates) == 20
                assert set(turn.candidates[:-1]) <= replies - own


def test_convai2_has_the_names_of_parlai(make_dialogue, write, tmp_path):
    write("convai2/train_self_original.txt", _text(DOG))
    write("convai2/valid_self_original.txt", _text(CAT))
    sources = {split: ["convai2"] for split in ("train", "validation", "test")}
    data = make_dialogue(**sources, data_dir=str(tmp_path / "data"))
    assert data.problems("fit") == data.problems("test") == []
    assert [len(list(data.examples(split))) for split in sources] == [3, 1, 1]
    assert {example.task for example in data.examples("test")} == {"convai2"}


def test_sources_that_are_not_there(make_dialogue, tmp_path):
    data = make_dialogue(
        train=["convai2"], validation=["personachat"], test=["/gone.txt[5:]"], data_dir=str(tmp_path)
    )
    first, second = data.problems("fit")
    assert first.startswith("data.train: task 'convai2' needs the file ")
    assert "convai2/train_self_original.txt, which does not exist" in first
    assert second.startswith(
        "data.validation: task 'personachat' is unknown; accepted: convai2, smalltalk, a file ("
    )
    assert ".txt" in second
    assert data.problems("test") == ["data.test: the file /gone.txt does not exist"]


def test_a_json_file_has_its_sections(make_dialogue, write):
    def entry(reply):
        return {"personality": ["me ."], "utterances": [{"candidates": ["no", reply], "history": ["hi"]}]}

    path = write("chat.json", {"train": [entry("a"), entry("b")], "valid": [entry("c")]})
    data = make_dialogue(train=[f"{path}[1:]"], validation=[path], test=[path])
    assert [
        [example.answers for example in data.examples(split)] for split in ("train", "validation", "test")
    ] == [
        [[" b"]],
        [[" c"]],
        [[" no", " c"]],
    ]


def test_the_hub_has_no_test_split(make_dialogue, monkeypatch):
    asked = []
    row = {"personality": ["me ."], "utterances": [{"candidates": ["no", "yes"], "history": ["hi"]}]}
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, config, split: asked.append((name, split)) or [row, row]
    )
    data = make_dialogue(train=["owner/chat[:1]"], validation=["owner/chat"], test=["owner/chat"])
    assert [len(list(data.examples(split))) for split in ("train", "validation", "test")] == [1, 2, 2]
    assert asked == [("owner/chat", "train"), ("owner/chat", "validation"), ("owner/chat", "validation")]
    assert next(data.examples("test")).task == "chat"
    row["utterances"] = []
    with pytest.raises(ConfigError, match=r"owner/chat\[validation\], row 1: field 'utterances'"):
        list(data.examples("test"))


def test_a_broken_file_stops_the_fit(make_dialogue, write):
    path = write("bad.txt", _text(DOG) + "2 your persona: late\n")
    with pytest.raises(ConfigError, match=r"bad\.txt, line 6: expected a line that begins with 1 or 6"):
        make_dialogue(train=[path], validation=1, stage="fit")


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("split_by", "row", "dialogue, persona"),
        ("max_history_turns", -1, "null, or an integer of at least 0"),
        ("train_on", "every_response", "response, all"),
    ],
)
def test_a_problem_names_setting_value_and_what_is_accepted(setting, value, accepted, make_dialogue):
    (problem,) = make_dialogue(**{setting: value}).problems("fit")
    assert problem.startswith(f"data.{setting}: ")
    assert str(value) in problem
    assert accepted in problem


# --- real rows ---


def test_real_personas_are_kept_apart(real_source, make_dialogue):
    """702 dialogues of 68 personas with 5 to 10 sentences each, of which a dialogue shows 4 or 5."""
    dialogues = list(read_parlai(os.path.expandvars(real_source)))
    numbers = persona_ids([dialogue.persona for dialogue in dialogues])
    sentences = [
        {s for d, n in zip(dialogues, numbers, strict=True) if n == k for s in d.persona} for k in range(68)
    ]
    assert set(numbers) == set(range(68))
    assert {len(found) for found in sentences} == set(range(5, 11))
    settings = {"split_by": "persona", "max_history_turns": 0, "validation": 120}
    data = make_dialogue(train=[f"{real_source}[:66]"], test=[f"{real_source}[66:]"], **settings)
    rows = {split: [e.group for e in data.examples(split)] for split in ("train", "test")}
    assert (len(set(rows["train"])), len(set(rows["test"]))) == (66, 2)
    assert len(rows["train"]) + len(rows["test"]) == 5466
    data.setup("fit")
    assert 120 <= len(data.tables["validation"]) < 240
    found = data.overlaps()
    assert not found[2].rows
    assert not found[3].rows


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_real_rows_fit_with_their_personas(template, real_source, make_dialogue, smollm2):
    settings = {
        "test": [f"{real_source}[:12]"],
        "max_length": 144,
        "template": template,
        "tokenizer": smollm2,
    }
    data = make_dialogue(**settings, stage="test")
    table = data.tables["test"]
    assert not any(table["truncated"])
    assert max(map(max, table["lengths"])) <= 144
    assert {len(labels) for labels in table["labels"]} == {20}
    path = os.path.expandvars(real_source)
    personas = [" ".join(d.persona) for d in read_parlai(path) for _ in d.turns]
    texts = smollm2.batch_decode(table["prompt"][:])
    assert all(persona in text for persona, text in zip(personas, texts, strict=False))


# --- hits@1 ---


def test_hits_at_1_is_the_hand_computation_on_20_rows(tiny_backbone, tmp_path):
    """The sample's first five test dialogues, read without the package, an unpadded forward a candidate."""
    data = DialogueDataModule(
        template="plain", train_on="response", test=["smalltalk[:5]"], max_length=512, eval_batch_size=40
    )
    data.connect(load_tokenizer(BackboneConfig(id=str(tiny_backbone))))
    report = EvaluationReport(str(tmp_path))
    tiny_trainer(tmp_path, report).test(tiny_module(tiny_backbone), datamodule=data, verbose=False)
    assert report.result is not None
    assert len(report.result.examples) == 20

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_backbone),
        AutoTokenizer.from_pretrained(tiny_backbone),
    )
    rows = sorted(report.result.examples, key=lambda row: row["example"])
    prompt, personas, hits, nats, tokens = "", [], 0, 0.0, 0
    for line in (SAMPLES / "test.txt").read_text().splitlines():
        text = line.partition(" ")[2]
        if line.startswith("1 "):
            personas, prompt = [], ""
        if text.startswith("your persona: "):
            personas.append(text.removeprefix("your persona: "))
            continue
        if not rows:
            break
        partner, reply, _, listed = text.split("\t")
        prompt = (prompt or f"Persona: {' '.join(personas)}") + f"\nPartner: {partner}\nYou:"
        scores = []
        for candidate in listed.split("|"):
            ids = [*tokenizer(f"{prompt} {candidate}").input_ids, tokenizer.eos_token_id]
            start = len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[place - 1, ids[place]]) for place in range(start, len(ids))))
        nats, tokens = nats - scores[-1], tokens + len(ids) - start
        row = rows.pop(0)
        assert row["likelihood"]["log_likelihoods"] == pytest.approx(scores, rel=1e-4)
        assert row["gold"] == 19
        hits += scores.index(max(scores)) == 19
        prompt += f" {reply}"
    assert report.result.accuracy("sum").value == hits / 20
    assert math.exp(report.result.gold_loss) == pytest.approx(math.exp(nats / tokens), rel=1e-4)
