"""Token tables: their columns, their cache, and the hash of what a model sees of them."""

import pytest

from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.tokenization import cache as tables
from gatera_lightning.datamodules.tokenization.cache import data_hash, tokenize_split
from gatera_lightning.errors import ConfigError

EOS = 0  # words by hand: 3 Question: · 4 cat? · 5 Answer: · 6 yes · 7 no · 8 never
PROMPT = "Question: cat?\nAnswer:"
EXAMPLES = [
    Example(PROMPT, [" yes", " no never"], 1, "pets", labels=("y", "n"), identity="Is it a cat?"),
    Example("cat? cat? " + PROMPT, [" no", " never never"], 0, "others"),
]


@pytest.fixture
def words(tokenizers_by_kind):
    return tokenizers_by_kind["words"]


def test_the_columns_by_hand(words):
    assert list(tokenize_split(EXAMPLES, words, 7, "test")) == [
        {
            "prompt": [3, 4, 5],
            "earlier": [],
            "answers": [[6, EOS], [7, 8, EOS]],
            "lengths": [5, 6],
            "characters": [3, 8],
            "labels": ["y", "n"],
            "gold": 1,
            "task": "pets",
            "example": 0,
            "key": EXAMPLES[0].key,
            "group": "",
            "shortened": False,
        },
        {
            "prompt": [4, 3, 4, 5],
            "earlier": [],
            "answers": [[7, EOS], [8, 8, EOS]],
            "lengths": [6, 7],
            "characters": [2, 11],
            "labels": [" no", " never never"],  # the answers, where an example says nothing else
            "gold": 0,
            "task": "others",
            "example": 1,
            "key": EXAMPLES[1].key,
            "group": "",
            "shortened": True,
        },
    ]


@pytest.mark.parametrize(("kind", "prompt"), [("words", [1, 3, 4, 5]), ("words_bos", [1, 3, 4, 5])])
def test_special_tokens_of_a_chat_are_its_text(kind, prompt, tokenizers_by_kind):
    """Both write ``<bos>``: one as text, the other by itself as well, which is left to plain prompts."""
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


def test_no_example():
    with pytest.raises(ConfigError, match=r"data\.train: the split is empty; give at least one row"):
        tokenize_split([], None, 99, "train")


# --- the cache ---


def test_a_cached_table_is_the_one_that_was_written(words, tokenised, token_cache):
    fresh = tokenize_split(EXAMPLES, words, 7, "test")
    cached = tokenize_split(EXAMPLES, words, 7, "test")
    assert len(tokenised) == 2
    assert len(list(token_cache.glob("*.arrow"))) == 1
    assert cached.features == fresh.features
    assert list(cached) == list(fresh)


def test_a_table_of_an_older_version_is_not_read(words, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(tables, "_CACHE_VERSION", tables._CACHE_VERSION - 1)
        older.setattr(
            tables, "tokenize_example", lambda *_, **__: ([3], [[4], [5]], False)
        )  # as it might once have been
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
def test_whatever_a_row_holds_is_read_anew(other, words):
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


def test_another_end_of_a_turn_tokenises_again(chat_tokenizers):
    """The prompt of the same chat is the same, and so is everything else that a tokenizer is made of."""
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


# --- the hash ---


def _hash(words, examples=EXAMPLES, max_length=99):
    return data_hash(tokenize_split(examples, words, max_length, "test"))


def test_a_hash_is_16_hex_digits_and_survives_the_cache(words, token_cache):
    first = _hash(words)
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert _hash(words) == first  # from the cache
    for file in token_cache.glob("*"):
        file.unlink()
    assert _hash(words) == first


def test_a_hash_is_that_of_the_rows_selected(words):
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
def test_a_hash_changes_with_what_a_model_sees(change, words):
    examples = [_with(example, identity="the same") for example in EXAMPLES]
    assert _hash(words, change(*examples)) != _hash(words, examples)


def test_a_hash_changes_with_tokens_alone(words, tokenizers_by_kind):
    hashes = {_hash(words), _hash(words, max_length=6), _hash(tokenizers_by_kind["words_bos"])}
    assert len(hashes) == 3


def _with(example, **changes):
    return Example(**(vars(example) | changes))
