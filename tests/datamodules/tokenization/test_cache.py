"""Token tables: columns, cache and hash."""

import copy
import datetime
import itertools
import json
import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tokenizers import normalizers, pre_tokenizers, processors
from transformers.utils import chat_template_utils

from gatera_lightning.datamodules import InstructionDataModule
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.tokenization import cache
from gatera_lightning.datamodules.tokenization.cache import data_hash, tokenize_split
from gatera_lightning.datamodules.tokenization.tokenize import tokenize_example
from gatera_lightning.errors import ConfigError

EOS = 0  # ids of the other words: 3 Question: · 4 cat? · 5 Answer: · 6 yes · 7 no · 8 never
PROMPT = "Question: cat?\nAnswer:"
EXAMPLES = [
    Example(PROMPT, [" yes", " no never"], 1, "pets", labels=("y", "n"), identity="Is it a cat?"),
    Example("cat? cat? " + PROMPT, [" no", " never never"], 0, "others"),
]


@pytest.fixture
def words(tokenizers_by_kind):
    return tokenizers_by_kind["words"]


def test_token_table_by_hand(words):
    assert list(tokenize_split(EXAMPLES, words, 7, "test")) == [
        {
            "prompt": [3, 4, 5],
            "earlier_responses": [],
            "answers": [[6, EOS], [7, 8, EOS]],
            "lengths": [5, 6],
            "characters": [3, 8],
            "labels": ["y", "n"],
            "gold": 1,
            "task": "pets",
            "example": 0,
            "key": EXAMPLES[0].key,
            "request_key": EXAMPLES[0].key,
            "group": "",
            "truncated": False,
        },
        {
            "prompt": [4, 3, 4, 5],
            "earlier_responses": [],
            "answers": [[7, EOS], [8, 8, EOS]],
            "lengths": [6, 7],
            "characters": [2, 11],
            "labels": [" no", " never never"],  # the answers by default
            "gold": 0,
            "task": "others",
            "example": 1,
            "key": EXAMPLES[1].key,
            "request_key": EXAMPLES[1].key,
            "group": "",
            "truncated": True,
        },
    ]


@pytest.mark.parametrize(("kind", "prompt"), [("words", [1, 3, 4, 5]), ("words_bos", [1, 3, 4, 5])])
def test_chat_prompt_contains_its_special_tokens(kind, prompt, tokenizers_by_kind):
    """Both prompts contain ``<bos>`` as text; the tokenizer ``words_bos`` adds it to plain prompts."""
    tokenizer = tokenizers_by_kind[kind]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    try:
        (chat,) = tokenize_split(
            [Example(f"<bos> {PROMPT}", [" yes"], 0, "t", chat=True)], tokenizer, 99, "test"
        )
        (plain,) = tokenize_split([Example(PROMPT, [" yes"], 0, "t")], tokenizer, 99, "test")
    finally:
        tokenizer.chat_template = None
    assert chat["prompt"] == prompt
    assert plain["prompt"] == (prompt if kind == "words_bos" else prompt[1:])


def test_tokenize_split_rejects_empty_split():
    with pytest.raises(ConfigError, match=r"data\.train: the split is empty; give at least one example"):
        tokenize_split([], None, 99, "train")


# --- cache ---


def test_cached_table_equals_written_table(words, tokenized_prompts, token_cache):
    fresh = tokenize_split(EXAMPLES, words, 7, "test")
    cached = tokenize_split(EXAMPLES, words, 7, "test")
    assert len(tokenized_prompts) == 2
    assert len(list(token_cache.glob("*.arrow"))) == 1
    assert cached.features == fresh.features
    assert list(cached) == list(fresh)


def test_cache_ignores_older_versions(words, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(cache, "_CACHE_VERSION", cache._CACHE_VERSION - 1)
        older.setattr(cache, "tokenize_example", lambda *_, **__: ([3], [[4], [5]], False))
        assert tokenize_split(EXAMPLES, words, 99, "test")["prompt"][:] == [[3], [3]]
    assert tokenize_split(EXAMPLES, words, 99, "test")["prompt"][:] == [[3, 4, 5], [4, 4, 3, 4, 5]]


@pytest.mark.parametrize(
    "other",
    [
        Example(PROMPT + " yes", [" yes", " no never"], 1, "pets", ("y", "n"), "Is it a cat?"),
        Example(PROMPT, [" yes", " no"], 1, "pets", ("y", "n"), "Is it a cat?"),
        Example(PROMPT, [" yes", " no never"], 0, "pets", ("y", "n"), "Is it a cat?"),
        Example(PROMPT, [" yes", " no never"], 1, "cats", ("y", "n"), "Is it a cat?"),
        Example(PROMPT, [" yes", " no never"], 1, "pets", ("n", "y"), "Is it a cat?"),
        Example(PROMPT, [" yes", " no never"], 1, "pets", ("y", "n"), "Is it a dog?"),
    ],
    ids=repr,
)
def test_cache_distinguishes_examples(other, words):
    tokenize_split(EXAMPLES[:1], words, 99, "test")
    (row,) = tokenize_split([other], words, 99, "test")
    assert row["prompt"] == words(other.prompt).input_ids
    assert row["answers"] == [[*words(answer).input_ids, EOS] for answer in other.answers]
    assert (row["gold"], row["task"], row["key"], tuple(row["labels"])) == (
        other.gold,
        other.task,
        other.key,
        other.labels,
    )


def test_cache_distinguishes_turn_ends(chat_tokenizers):
    """The end of a turn depends on the chat template, which is not part of the tokenizer's state."""
    tokenizer = chat_tokenizers["gemma"]
    template, example = tokenizer.chat_template, Example("Where?", ["here"], 0, "t", chat=True)
    ends = []
    try:
        for end in ("<end_of_turn>", "<start_of_turn>", ""):
            tokenizer.chat_template = template.replace("<end_of_turn>", end)
            ends.append(tokenizer.decode(tokenize_split([example], tokenizer, 99, "test")[0]["answers"][0]))
    finally:
        tokenizer.chat_template = template
    assert ends == ["here<end_of_turn><eos>", "here<start_of_turn><eos>", "here<eos>"]


def _set(name, value):
    return lambda tokenizer: setattr(tokenizer, name, value)


def _backend(name, build):
    return lambda tokenizer: setattr(tokenizer.backend_tokenizer, name, build())


TOKENIZER_CHANGES = {
    "split_special_tokens": _set("split_special_tokens", True),
    "a special token": lambda tokenizer: tokenizer.add_special_tokens({"additional_special_tokens": ["say"]}),
    "an added token": lambda tokenizer: tokenizer.add_tokens(["Now"]),
    "another EOS": _set("eos_token", "<unk>"),
    "added BOS": _backend(
        "post_processor",
        lambda: processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)]),
    ),
    "normalizer": _backend("normalizer", normalizers.Lowercase),
    "pre-tokenizer": _backend("pre_tokenizer", lambda: pre_tokenizers.ByteLevel(add_prefix_space=True)),
}


@pytest.mark.parametrize("change", TOKENIZER_CHANGES)
def test_cached_table_is_that_of_the_tokenizer(change, tokenizers_by_kind):
    """A table is read from the cache only if the tokenizer would write the same one now."""
    examples = [Example("say <eos> Now", [" x"], 0, "t")]
    first, other = (copy.deepcopy(tokenizers_by_kind["plain"]) for _ in range(2))
    TOKENIZER_CHANGES[change](other)
    before = tokenize_split(examples, first, 50, "train")[0]
    after = tokenize_split(examples, other, 50, "train")[0]
    (answer,) = tokenize_example(other, "say <eos> Now", [" x"], 50).answer_ids
    assert after["prompt"] == other("say <eos> Now").input_ids
    assert after["answers"] == [answer]
    assert (after["prompt"], after["answers"]) != (before["prompt"], before["answers"])


def test_cache_does_not_depend_on_earlier_padding(tokenized_prompts, tokenizers_by_kind):
    """Padding and truncation of a call stay in the backend of a tokenizer, but change no table."""
    tokenizer = copy.deepcopy(tokenizers_by_kind["plain"])
    tokenize_split(EXAMPLES, tokenizer, 99, "test")
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=3)
    tokenize_split(EXAMPLES, tokenizer, 99, "test")
    assert len(tokenized_prompts) == len(EXAMPLES)


@pytest.mark.parametrize("setting", ["vocabulary", "flag", "added token"])
def test_cache_distinguishes_slow_tokenizers(setting, monkeypatch):
    def digest(**settings):
        words = {"a": 0, "b": 1} if settings.get("vocabulary") else {"a": 1, "b": 0}
        tokenizer = SimpleNamespace(
            special_tokens_map={},
            split_special_tokens=False,
            get_vocab=lambda: words,
            added_tokens_decoder={5: "x"} if settings.get("added token") else {},
            init_kwargs={"add_eos_token": bool(settings.get("flag")), "vocab_file": "/anywhere"},
        )
        return cache._tokenizer_digest(tokenizer)

    monkeypatch.setattr(cache, "control_tokens", lambda tokenizer: SimpleNamespace(tokens=()))
    assert digest() == digest()
    assert digest(**{setting: True}) != digest()


def test_table_does_not_change_overnight(with_chat_template, tokenized_prompts, monkeypatch, make_ranks):
    """A template that writes the date gives the same tokens, the same cache and the same hash every day."""
    tokenizer = with_chat_template(
        "{{ strftime_now('%c') }}{% for m in messages %}|{{ m.content }}{% endfor %}", "turn_ends_in_eos"
    )

    class Clock(datetime.datetime):
        days = itertools.count(1)

        @classmethod
        def now(cls, tz=None):
            return cls(2031, 3, next(cls.days))

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    hashes = set()
    for _ in range(2):
        (module,) = make_ranks(2, stage="test", template="chat", tokenizer=tokenizer)
        hashes.add(data_hash(module.tables["test"]))
    assert len(hashes) == 1
    assert len(tokenized_prompts) == 2


# --- cache of a data module ---


def test_second_setup_reads_cache(tokenized_prompts, make_ranks):
    (first,) = make_ranks(5, stage="test")
    assert len(tokenized_prompts) == 5
    (second,) = make_ranks(5, stage="test")
    assert len(tokenized_prompts) == 5
    assert first.tables["test"].to_dict() == second.tables["test"].to_dict()


def test_prepare_data_and_setup_tokenize_once(tokenized_prompts, make_ranks):
    (module,) = make_ranks(5, stage=None, validation=1)
    module.trainer = None
    module.prepare_data()
    module.setup("fit")
    assert len(tokenized_prompts) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 50},
        {"template": "plain"},
        {"answer_format": "content"},
        {"template": "chat", "tokenizer": "gemma"},
        {"tokenizer": "plain"},
        {"tokenizer": "closing"},
        {"tokenizer": "pieces"},
    ],
    ids=str,
)
def test_cache_misses_when_tokens_change(
    change, tokenized_prompts, make_ranks, tokenizers_by_kind, chat_tokenizers
):
    make_ranks(5, stage="test")
    if "tokenizer" in change:
        change = change | {"tokenizer": (tokenizers_by_kind | chat_tokenizers)[change["tokenizer"]]}
    make_ranks(5, stage="test", **change)
    assert len(tokenized_prompts) == 10
    make_ranks(5, stage="test", **change)
    assert len(tokenized_prompts) == 10


def test_cache_misses_when_examples_change(tokenized_prompts, make_ranks):
    make_ranks(5, stage="test")
    make_ranks(6, stage="test")
    assert len(tokenized_prompts) == 11


@pytest.mark.parametrize(
    "change",
    [
        {"train_on": "all"},
        {"seed": 4},
        {"batch_size": 2},
        {"eval_batch_size": 2},
        {"num_workers": 2},
        {"evaluate_by": ["generation"]},
    ],
    ids=str,
)
def test_cache_hits_when_tokens_do_not_change(change, tokenized_prompts, make_ranks):
    make_ranks(5, stage="test")
    make_ranks(5, stage="test", **change)
    assert len(tokenized_prompts) == 5


def test_interrupted_tokenization_leaves_no_cache(make_ranks, monkeypatch):
    original, calls = cache.tokenize_example, []

    def fail_at_the_fourth(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(cache, "tokenize_example", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        make_ranks(5, stage="test")
    (module,) = make_ranks(5, stage="test")
    assert module.tables["test"]["example"][:] == [0, 1, 2, 3, 4]


def test_too_long_answer_error_names_split_and_example(make_ranks):
    with pytest.raises(
        ConfigError, match=r"data\.train, example 0 \('Below is.*an answer has \d+ tokens.*max_length 5"
    ):
        make_ranks(3, max_length=5)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_too_long_answer_error_names_file_and_row(suffix, write, words):
    rows = [{"instruction": "Say it.", "output": "So."}] * 2 + [{"instruction": "Say.", "output": "so " * 99}]
    file = write(f"long{suffix}", rows if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    data = InstructionDataModule(
        template="plain", train_on="response", max_length=30, train=[file], validation=1
    )
    data.connect(words)
    with pytest.raises(ConfigError, match=rf"^{re.escape(file)}, row 3: .*an answer has \d+ tokens"):
        data.setup("fit")


def test_cache_does_not_depend_on_the_place_of_a_row(words, token_cache):
    for place in ("a.jsonl, row 1", "b.jsonl, row 2"):
        tokenize_split([replace(EXAMPLES[0], place=place)], words, 99, "test")
    assert len(list(token_cache.glob("*.arrow"))) == 1


def test_truncated_prompts_are_logged(make_ranks, caplog):
    with caplog.at_level(logging.WARNING):
        make_ranks(5, stage="test", max_length=40)
        make_ranks(5, stage="test", max_length=512)
    assert [record.getMessage() for record in caplog.records] == [
        "test: 5 of 5 prompts were truncated to fit max_length 40"
    ]


def test_token_table_names_tasks(make_data, write, rows):
    sources = [write("zoo.json", rows(2)), write("art.json", rows(3))]
    module = make_data(test=sources, stage="test")
    assert module.tables["test"]["task"][:] == ["zoo", "zoo", "art", "art", "art"]
    assert module.tables["test"]["example"][:] == [0, 1, 2, 3, 4]


# --- hash ---


def _hash(words, examples=EXAMPLES, max_length=99):
    return data_hash(tokenize_split(examples, words, max_length, "test"))


def test_data_hash_does_not_depend_on_cache(words, token_cache):
    first = _hash(words)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert _hash(words) == first  # from the cache
    for file in token_cache.glob("*"):
        file.unlink()
    assert _hash(words) == first


def test_data_hash_of_selected_examples(words):
    table = tokenize_split(EXAMPLES, words, 99, "test")
    assert data_hash(table.select([0])) == _hash(words, EXAMPLES[:1])
    assert data_hash(table.select([1, 0])) == _hash(words, EXAMPLES[::-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda first, second: [second, first],
        lambda first, second: [first],
        lambda first, second: [first, second, second],
        lambda first, second: [_with(first, prompt=PROMPT + " yes"), second],
        lambda first, second: [_with(first, answers=[" yes", " no yes"]), second],
        lambda first, second: [_with(first, answers=[" yes no", " never"]), second],
        lambda first, second: [_with(first, gold=0), second],
        lambda first, second: [first, _with(second, task="pets")],
    ],
    ids=["order", "fewer", "more", "prompt", "answer", "boundary", "gold", "task"],
)
def test_data_hash_changes_with_examples(change, words):
    examples = [_with(example, identity="the same") for example in EXAMPLES]
    assert _hash(words, change(*examples)) != _hash(words, examples)


def test_data_hash_changes_with_tokens(words, tokenizers_by_kind):
    hashes = {_hash(words), _hash(words, max_length=6), _hash(tokenizers_by_kind["words_bos"])}
    assert len(hashes) == 3


def _with(example, **changes):
    return Example(**(vars(example) | changes))
