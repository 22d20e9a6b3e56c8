"""Dialogues: one example per reply, candidates, groups that are not divided, and sources."""

import logging
from importlib import resources
from pathlib import Path

import pytest
from dialogues import parlai_text

from gatera_lightning.datamodules import DialogueDataModule
from gatera_lightning.datamodules.tasks.convai2_files import read_parlai
from gatera_lightning.errors import ConfigError

SAMPLES = Path(str(resources.files("gatera_lightning.datamodules"))) / "samples" / "smalltalk"
DOG = (
    ["i have a dog .", "i bake ."],
    [("hi ?", "hello !"), ("pets ?", "a dog ."), ("bye", "see you .")],
    ["no .", "blue"],
)
CAT = (["i like cats ."], [("hey", "hi .")], ["no .", "red"])
SPLITS = ("train", "validation", "test")


def numbered_dialogues(count):
    """Two dialogues of each of ``count`` personas, which share one sentence; the texts contain the number."""
    dialogues = []
    for number in range(2 * count):
        persona = [f"i am {word} {number % count}" for word in ("one", "two", "three")] + ["i like tea"]
        turns = [(f"q{number} {turn} ?", f"r{number} {turn} .") for turn in range(3)]
        dialogues.append((persona[number // count :], turns, ["no"]))
    return dialogues


def numbers_of(data, split):
    """The number of the dialogue that each example of a split belongs to."""
    texts = data.tokenizer.batch_decode(data.tables[split]["prompt"][:])
    return [int(text.rsplit("Partner: q", 1)[1].split()[0]) for text in texts]


# --- examples ---


def test_every_reply_is_an_example(make_dialogue_data, write):
    data = make_dialogue_data(train=[write("a.txt", parlai_text(DOG, CAT))])
    examples = list(data.examples("train"))
    persona = "Persona: i have a dog . i bake .\n"
    first = f"{persona}Partner: hi ?\nYou:"
    second = f"{first} hello !\nPartner: pets ?\nYou:"
    assert [(example.prompt, example.answers) for example in examples] == [
        (first, [" hello !"]),
        (second, [" a dog ."]),
        (f"{second} a dog .\nPartner: bye\nYou:", [" see you ."]),
        ("Persona: i like cats .\nPartner: hey\nYou:", [" hi ."]),
    ]
    assert {(example.gold, example.task, example.chat) for example in examples} == {(0, "a", False)}


@pytest.mark.parametrize("kind", ["turn_ends_in_eos", "gemma", "llama3", "llama2"])
def test_chat_prompts_are_tokenized_without_further_special_tokens(
    kind, chat_tokenizers, make_dialogue_data, write
):
    tokenizer, source = chat_tokenizers[kind], [write("a.txt", parlai_text(DOG))]
    data = make_dialogue_data(
        train=source, validation=source, template="chat", tokenizer=tokenizer, stage="fit"
    )
    row, example = data.tables["train"][2], list(data.examples("train"))[2]
    assert example.chat
    assert row["prompt"] == tokenizer(example.prompt, add_special_tokens=False).input_ids
    assert row["prompt"].count(tokenizer.bos_token_id) == example.prompt.count("<bos>")
    assert tokenizer.decode(row["answers"][0]).strip().startswith("see you .")


@pytest.mark.parametrize(("turns", "shown"), [(None, 2), (5, 2), (2, 2), (1, 1), (0, 0)])
def test_max_history_turns(turns, shown, make_dialogue_data, write):
    data = make_dialogue_data(train=[write("a.txt", parlai_text(DOG))], max_history_turns=turns)
    persona, *history = list(data.examples("train"))[-1].prompt.split("\n")
    assert persona == "Persona: i have a dog . i bake ."
    lines = ["Partner: hi ?", "You: hello !", "Partner: pets ?", "You: a dog .", "Partner: bye", "You:"]
    assert history == lines[4 - 2 * shown :]


def test_example_that_is_too_long_is_reported(make_dialogue_data, write):
    path = write("a.txt", parlai_text(CAT, (["i like " + "very " * 60 + "long walks ."], *CAT[1:])))
    message = (
        rf"^{path}, dialogue 2, turn 1: the persona, the partner's last text and a reply have more than "
        "max_length 80 tokens$"
    )
    with pytest.raises(ConfigError, match=message):
        make_dialogue_data(train=[path], validation=[path], max_length=80).setup("fit")
    with pytest.raises(ConfigError, match=r"dialogue 1, turn 1: an answer has \d+ tokens, .* max_length 3$"):
        list(make_dialogue_data(train=[path], max_length=3).examples("train"))


def test_template_is_required(make_dialogue_data):
    with pytest.raises(ConfigError, match="turn 1: unknown template None"):
        next(make_dialogue_data(template=None).examples("train"))


def test_tokenizer_is_required():
    with pytest.raises(RuntimeError, match=r"no tokenizer yet: call connect\(tokenizer\) first"):
        next(DialogueDataModule(template="plain", train_on="response").examples("train"))


def test_question_key_does_not_depend_on_the_prompt(make_dialogue_data, write):
    source = [write("a.txt", parlai_text(DOG, CAT))]

    def keys(**settings):
        return [example.key for example in make_dialogue_data(train=source, **settings).examples("train")]

    found = keys()
    assert len(set(found)) == 4
    assert found == keys(template="alpaca") == keys(max_history_turns=0) == keys(max_length=60)
    other = parlai_text((DOG[0], [*DOG[1][:1], ("pets ?", "none .")], []))
    tested = make_dialogue_data(test=[write("b.txt", other)]).examples("test")
    same, other_reply = (example.key for example in tested)
    assert same == found[0]  # although the candidates differ
    assert other_reply not in found


# --- candidates ---


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (1, 1, 3)),
        ({"rank_validation": True}, (1, 3, 3)),
        ({"rank_validation": True, "validation": 1}, (3, 3, 3)),
        ({"validation": 1}, (1, 1, 3)),
    ],
)
def test_distractors_are_loaded_where_candidates_are_ranked(settings, counts, make_dialogue_data, write):
    source = [write("a.txt", parlai_text(DOG, CAT))]
    data = make_dialogue_data(**(dict.fromkeys(SPLITS, source) | settings), stage="fit")
    data.setup("test")
    for split, count in zip(SPLITS, counts, strict=True):
        assert {len(labels) for labels in data.tables[split]["labels"]} == {count}
        for row in data.tables[split]:
            assert row["labels"][row["gold"]] in {"hello !", "a dog .", "see you .", "hi ."}
    assert data.tables["test"]["labels"][1] == ["no .", "blue", "a dog ."]
    assert data.tables["test"]["gold"][:] == [2] * 4
    assert data.tables["test"]["characters"][3] == [4, 3, 4]


def test_generated_reply_is_parsed_as_candidate(make_dialogue_data):
    data = make_dialogue_data()
    texts = (" A dog .\nno .", "cat", "no")
    assert [data.parse_answer(text, ["no .", "a dog ."]).choice for text in texts] == [1, None, 0]


# --- groups ---


@pytest.mark.parametrize("seed", range(4))
def test_validation_does_not_divide_dialogues(seed, make_dialogue_data, write):
    source = [write("a.txt", parlai_text(*numbered_dialogues(5)))]
    data = make_dialogue_data(train=source, validation=5, seed=seed, stage="fit")
    train, validation = numbers_of(data, "train"), numbers_of(data, "validation")
    assert len(validation) == 6
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(list(range(10)) * 3)


@pytest.mark.parametrize("seed", range(4))
def test_validation_does_not_divide_personas(seed, make_dialogue_data, write):
    """Dialogues n and n + 5 have the same persona, also if they are in different files."""
    dialogues = numbered_dialogues(5)
    sources = [write("a.txt", parlai_text(*dialogues[:7])), write("b.txt", parlai_text(*dialogues[7:]))]
    data = make_dialogue_data(train=sources, validation=5, seed=seed, split_by="persona", stage="fit")
    train, validation = ({n % 5 for n in numbers_of(data, split)} for split in ("train", "validation"))
    assert len(data.tables["validation"]) == 6
    assert not train & validation
    assert train | validation == set(range(5))


def test_same_dialogue_in_two_files_forms_two_groups(make_dialogue_data, write):
    sources = [write("a.txt", parlai_text(CAT)), write("b.txt", parlai_text(CAT))]
    assert len({example.group for example in make_dialogue_data(train=sources).examples("train")}) == 2


@pytest.mark.parametrize("split_by", ["dialogue", "persona"])
def test_single_group_cannot_be_divided(split_by, make_dialogue_data, write):
    dialogues = [DOG] if split_by == "dialogue" else [DOG, DOG]
    source = [write("a.txt", parlai_text(*dialogues))]
    with pytest.raises(
        ConfigError, match=r"^data\.validation: 1 .* none to train on, because examples of the same group"
    ):
        make_dialogue_data(train=source, validation=1, split_by=split_by, stage="fit")


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
def test_slice_counts_dialogues_or_personas(split_by, part, numbers, make_dialogue_data, write):
    source = write("a.txt", parlai_text(*numbered_dialogues(5))) + part
    data = make_dialogue_data(test=[source], split_by=split_by, stage="test")
    assert numbers_of(data, "test") == [number for number in numbers for _ in range(3)]


def test_overlaps_report_personas_if_splits_divide_them(make_dialogue_data, write):
    path = write("a.txt", parlai_text(*numbered_dialogues(5)))
    settings = {"train": [f"{path}[:3]"], "validation": [f"{path}[3:5]"], "test": [f"{path}[5:]"]}
    by_dialogue = make_dialogue_data(**settings, stage="fit").overlaps()
    assert [(overlap.split, overlap.size, overlap.indices) for overlap in by_dialogue] == [
        ("validation", 6, ()),
        ("test", 15, ()),
    ]
    settings["test"] = [write("b.txt", parlai_text(*numbered_dialogues(5)[7:], CAT))]
    *_, validation, test = make_dialogue_data(**settings, split_by="persona", stage="fit").overlaps()
    assert str(validation) == "train/validation persona overlap: none of 4 validation dialogues"
    assert str(test).startswith(
        "train/test persona overlap: 1 of 4 test dialogues have a persona of train (indices 0)."
    )


@pytest.mark.parametrize("seed", range(3))
def test_slices_and_validation_do_not_share_personas(seed, make_dialogue_data, write):
    path = write("a.txt", parlai_text(*numbered_dialogues(6)))
    settings = {"train": [f"{path}[:4]"], "validation": 4, "test": [f"{path}[4:]"], "seed": seed}
    data = make_dialogue_data(**settings, split_by="persona", stage="fit")
    assert [str(overlap) for overlap in data.overlaps()[2:]] == [
        "train/validation persona overlap: none of 2 validation dialogues",
        "train/test persona overlap: none of 4 test dialogues",
    ]


def test_persona_overlap_logs_warning(make_dialogue_data, write, caplog):
    path = write("a.txt", parlai_text(*numbered_dialogues(5)))
    with caplog.at_level(logging.INFO, "gatera_lightning.datamodules"):
        for train, test in ((f"{path}[:4]", f"{path}[4:]"), (path, path)):
            make_dialogue_data(train=[train], validation=3, test=[test], split_by="persona", stage="fit")
    levels = [record.levelname for record in caplog.records if "persona" in record.getMessage()]
    assert levels == ["INFO", "INFO", "INFO", "WARNING"]


def test_unreadable_test_dialogues_are_reported_once(make_dialogue_data, write):
    path = write("a.txt", parlai_text(*numbered_dialogues(3)))
    settings = {"train": [path], "validation": 2, "test": [write("bad.txt", "x")]}
    reports = [str(o) for o in make_dialogue_data(**settings, split_by="persona", stage="fit").overlaps()]
    assert len(reports) == 3
    assert "cannot be read" in reports[1]
    assert "validation dialogues" in reports[2]


# --- sources and settings ---


def test_sample(make_dialogue_data):
    data = make_dialogue_data(split_by="persona", stage="fit")
    data.setup("test")
    assert data.problems("fit") == data.problems("test") == []
    sizes = {split: len(table) for split, table in data.tables.items()}
    assert sizes == {"train": 85, "validation": 24, "test": 32}
    assert set(data.tables["test"]["task"]) == {"smalltalk"}
    assert [overlap.indices for overlap in data.overlaps()] == [()] * 4
    for split, count in (("train", 24), ("validation", 6), ("test", 8)):
        dialogues = list(read_parlai(str(SAMPLES / f"{split}.txt")))
        assert len(dialogues) == count
        replies = {turn.reply for dialogue in dialogues for turn in dialogue.turns}
        for dialogue in dialogues:
            own_replies = {turn.reply for turn in dialogue.turns}
            for turn in dialogue.turns:
                assert len(set(turn.candidates)) == len(turn.candidates) == 20
                assert set(turn.candidates[:-1]) <= replies - own_replies


def test_convai2_files_are_named_as_in_parlai(make_dialogue_data, write, tmp_path):
    write("convai2/train_self_original.txt", parlai_text(DOG))
    write("convai2/valid_self_original.txt", parlai_text(CAT))
    data = make_dialogue_data(**{split: ["convai2"] for split in SPLITS}, data_dir=str(tmp_path / "data"))
    assert data.problems("fit") == data.problems("test") == []
    assert [len(list(data.examples(split))) for split in SPLITS] == [3, 1, 1]
    assert {example.task for example in data.examples("test")} == {"convai2"}


def test_missing_sources(make_dialogue_data, tmp_path):
    sources = {"train": ["convai2"], "validation": ["personachat"], "test": ["/gone.txt[5:]"]}
    data = make_dialogue_data(**sources, data_dir=str(tmp_path))
    train, validation = data.problems("fit")
    file = f"{tmp_path}/convai2/train_self_original.txt"
    assert train.startswith(f"data.train: task 'convai2' needs the file {file}, which does not exist")
    accepted = (
        "convai2, smalltalk, a file (.txt, .json, .jsonl, .txt.gz, .json.gz, .jsonl.gz), "
        "or a hub id (owner/name)"
    )
    assert validation == f"data.validation: task 'personachat' is unknown; accepted: {accepted}"
    assert data.problems("test") == ["data.test: the file /gone.txt does not exist"]


def entry(reply):
    return {"personality": ["me ."], "utterances": [{"candidates": ["no", reply], "history": ["hi"]}]}


def test_json_file_has_sections(make_dialogue_data, write):
    path = write("chat.json", {"train": [entry("a"), entry("b")], "valid": [entry("c")]})
    data = make_dialogue_data(train=[f"{path}[1:]"], validation=[path], test=[path])
    answers = [[example.answers for example in data.examples(split)] for split in SPLITS]
    assert answers == [[[" b"]], [[" c"]], [[" no", " c"]]]


def test_hub_dataset_is_tested_on_its_validation_split(make_dialogue_data, monkeypatch):
    requests, row = [], entry("yes")
    monkeypatch.setattr(
        "datasets.load_dataset", lambda name, _, split: requests.append((name, split)) or [row, row]
    )
    data = make_dialogue_data(train=["owner/chat[:1]"], validation=["owner/chat"], test=["owner/chat"])
    assert [len(list(data.examples(split))) for split in SPLITS] == [1, 2, 2]
    assert requests == [("owner/chat", split) for split in ("train", "validation", "validation")]
    assert next(data.examples("test")).task == "chat"
    row["utterances"] = []
    with pytest.raises(ConfigError, match=r"owner/chat\[validation\], row 1: field 'utterances'"):
        list(data.examples("test"))


def test_malformed_file_stops_the_fit(make_dialogue_data, write):
    path = write("bad.txt", parlai_text(DOG) + "2 your persona: late\n")
    with pytest.raises(ConfigError, match=r"bad\.txt, line 6: expected a line that starts with 1 or 6"):
        make_dialogue_data(train=[path], validation=1, stage="fit")


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("split_by", "row", "dialogue, persona"),
        ("max_history_turns", -1, "null, or an integer of at least 0"),
        ("train_on", "every_response", "response, all"),
    ],
)
def test_problem_names_setting_value_and_accepted_values(setting, value, accepted, make_dialogue_data):
    (problem,) = make_dialogue_data(**{setting: value}).problems("fit")
    assert problem.startswith(f"data.{setting}: ")
    assert str(value) in problem
    assert f"accepted: {accepted}" in problem
