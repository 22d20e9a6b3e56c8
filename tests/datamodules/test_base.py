"""SupervisedDataModule: where its tokenizer comes from, its settings, and subclasses."""

import math

import lightning as L
import pytest
import torch
from tiny_backbone import tiny_module, tiny_trainer

from gatera_lightning.datamodules import CommonsenseDataModule
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.example import Example
from gatera_lightning.errors import ConfigError

# --- tokenizer ---


class _CountTokens(L.LightningModule):
    """Trains one parameter on any batch, with a given tokenizer."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def load_tokenizer(self):
        return self.tokenizer

    def training_step(self, batch, _):
        return self.weight * batch["step_tokens"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _NoTokenizer(_CountTokens):
    load_tokenizer = None


def _commonsense(**settings):
    defaults = {"template": "plain", "answer_format": "content", "train_on": "response", "batch_size": 8}
    sources = {"train": ["everyday[:16]"], "validation": ["everyday[:4]"], "test": ["everyday[:4]"]}
    return CommonsenseDataModule(**(defaults | sources | settings))


def test_fit_connects_to_gatera_module(tiny_backbone, tmp_path):
    """With a hand-written Trainer, without a call to ``connect``."""
    data, module = _commonsense(), tiny_module(tiny_backbone)
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    assert data.tokenizer.get_vocab() == module.load_tokenizer().get_vocab()


def test_test_connects_to_module(tiny_backbone, tmp_path):
    data, module = _commonsense(), tiny_module(tiny_backbone)
    tiny_trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert data.tokenizer is not None


def test_connected_tokenizer_takes_precedence(tokenizers_by_kind, tmp_path):
    data = _commonsense()
    data.connect(tokenizers_by_kind["plain"])
    tiny_trainer(tmp_path, max_steps=1).fit(_CountTokens(tokenizers_by_kind["bos"]), datamodule=data)
    assert data.tokenizer is tokenizers_by_kind["plain"]


def test_another_module_replaces_tokenizer(tokenizers_by_kind, tmp_path):
    """The token ids of one backbone must not reach another one."""
    data, prompts = _commonsense(), []
    for kind in ("plain", "bos", "bos"):
        tiny_trainer(tmp_path, max_steps=1).fit(_CountTokens(tokenizers_by_kind[kind]), datamodule=data)
        assert data.tokenizer is tokenizers_by_kind[kind]
        prompts.append(data.tables["train"]["prompt"][:])
    assert prompts[0] != prompts[1] == prompts[2]


def test_fit_rejects_module_without_tokenizer(tmp_path):
    message = (
        r"^CommonsenseDataModule has no tokenizer: call connect\(tokenizer\), or use a Trainer whose module "
        r"has a method load_tokenizer\(\), such as GateRAModule$"
    )
    with pytest.raises(RuntimeError, match=message):
        tiny_trainer(tmp_path).fit(_NoTokenizer(None), datamodule=_commonsense())


def test_setup_without_trainer_rejects_missing_tokenizer():
    with pytest.raises(RuntimeError, match=r"call connect\(tokenizer\)"):
        _commonsense().setup("fit")


def test_missing_chat_template_is_reported_before_weights_load(tiny_backbone, tmp_path):
    module = tiny_module(tiny_backbone)
    if module.load_tokenizer().chat_template:
        pytest.skip("the tiny backbone has a chat template")
    with pytest.raises(ConfigError, match=r"data\.template: chat"):
        tiny_trainer(tmp_path).fit(module, datamodule=_commonsense(template="chat"))
    assert module.model is None


def test_connect_replaces_open_tables(make_ranks, tokenizers_by_kind):
    (module,) = make_ranks(3, stage="test")
    module.connect(tokenizers_by_kind["pieces"])
    module.setup("test")
    (fresh,) = make_ranks(3, stage="test", tokenizer=tokenizers_by_kind["pieces"])
    assert module.tables["test"]["prompt"][:] == fresh.tables["test"]["prompt"][:]


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"train_on": None}, "data.train_on: is not set; accepted: response, every_response, all"),
        (
            {"train_on": "answer"},
            "data.train_on: 'answer' is unknown; accepted: response, every_response, all",
        ),
        ({"max_length": 0}, "data.max_length: 0; accepted: an integer of at least 1"),
        ({"batch_size": 0}, "data.batch_size: 0; accepted: an integer of at least 1"),
        ({"eval_batch_size": -1}, "data.eval_batch_size: -1; accepted: an integer of at least 1"),
        ({"token_budget": 0}, "data.token_budget: 0; accepted: null, or an integer of at least 1"),
        (
            {"evaluate_by": []},
            "data.evaluate_by: []; accepted: a list of likelihood and generation, each at most once",
        ),
        (
            {"evaluate_by": ["likelihood", "likelihood"]},
            "data.evaluate_by: ['likelihood', 'likelihood']; accepted: a list of likelihood and generation, "
            "each at most once",
        ),
        *(
            ({name: value}, f"data.{name}: {text}; accepted: an integer of at least 1{limit}")
            for name in ("max_length", "batch_size", "eval_batch_size")
            for value, text, limit in (
                (True, "True", ""),
                (32.0, "32.0", ""),
                (math.nan, "nan", ""),
                ("32", "'32'", ""),
                (None, "None", ""),
                (2**31, "2147483648", ", at most 2,147,483,647"),
                (10**5_000, "an integer of thousands of digits", ", at most 2,147,483,647"),
            )
        ),
        ({"num_workers": -1}, "data.num_workers: -1; accepted: an integer of at least 0"),
        ({"num_workers": 9999}, "data.num_workers: 9999; accepted: an integer of at least 0, at most 1,024"),
        ({"num_workers": False}, "data.num_workers: False; accepted: an integer of at least 0"),
        ({"seed": -1}, "data.seed: -1; accepted: an integer of at least 0"),
        ({"seed": 2**32}, "data.seed: 4294967296; accepted: an integer of at least 0, at most 4,294,967,295"),
        ({"seed": 1.5}, "data.seed: 1.5; accepted: an integer of at least 0"),
        ({"packing": "false"}, "data.packing: 'false'; accepted: true, false"),
        ({"group_by_length": 1}, "data.group_by_length: 1; accepted: true, false"),
        ({"token_budget": 2.5}, "data.token_budget: 2.5; accepted: null, or an integer of at least 1"),
        (
            {"evaluate_by": [["likelihood"]]},
            "data.evaluate_by: [['likelihood']]; accepted: a list of likelihood and generation, "
            "each at most once",
        ),
        (
            {"evaluate_by": None},
            "data.evaluate_by: [None]; accepted: a list of likelihood and generation, each at most once",
        ),
    ],
)
def test_problems_name_setting_value_and_accepted(settings, problem):
    assert _Capitals(**({"train_on": "response"} | settings)).problems("fit") == [problem]


def test_limits_of_settings_are_accepted():
    limits = {"max_length": 1, "batch_size": 2**31 - 1, "num_workers": 1_024, "seed": 2**32 - 1}
    assert _Capitals(train_on="response", **limits).problems("fit") == []
    assert _Capitals(train_on="response", num_workers=0, seed=0).problems("fit") == []


def test_a_single_kind_of_evaluation_needs_no_list():
    data = _Capitals(train_on="response", evaluate_by="generation")
    assert data.problems("test") == []
    assert data.evaluate_by == ["generation"]


@pytest.mark.parametrize("held_out", [0, -3, True, 0.0, 1.0, 1.5, math.nan, math.inf])
def test_problems_reject_validation_size(held_out):
    (problem,) = _Capitals(train_on="response", held_out=held_out).problems("fit")
    assert problem.startswith(
        f"data.validation: {held_out}; accepted: sources, or how many training examples"
    )


@pytest.mark.parametrize("held_out", [None, 1, 7, 0.01, 0.99])
def test_problems_accept_validation_size(held_out):
    assert _Capitals(train_on="response", held_out=held_out).problems("fit") == []


# --- subclasses ---


class _Capitals(SupervisedDataModule):
    """A task that only implements ``examples``."""

    def examples(self, split):
        yield Example("What is the capital of France?\nAnswer:", [" Lyon", " Paris"], 1, "capitals")


def test_subclass_must_implement_examples():
    with pytest.raises(TypeError, match=r"abstract.*examples"):
        SupervisedDataModule()


def test_answers_without_labels_are_parsed_by_their_text(tokenizer):
    data = _Capitals(train_on="response", evaluate_by=["likelihood", "generation"])
    data.connect(tokenizer)
    data.setup("test")
    (example,) = data.tables["test"]
    assert example["labels"] == [" Lyon", " Paris"]
    texts = (" paris.\nOr Lyon", "Lyon", "Nice", "")
    assert [data.parse_answer(text, example["labels"]).choice for text in texts] == [1, 0, None, None]


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_problems_of_all_settings_are_raised_without_command_line(tokenizers_by_kind, step):
    data = _commonsense(batch_size=0, eval_batch_size=-1, test=["gone.json"])
    data.connect(tokenizers_by_kind["plain"])
    with pytest.raises(ConfigError) as caught:
        data.setup("test") if step == "setup" else data.prepare_data()
    names = [problem.partition(":")[0] for problem in caught.value.problems]
    assert names[:2] == ["data.batch_size", "data.eval_batch_size"]
    assert names[2:] == (["data.test"] if step == "setup" else [])
