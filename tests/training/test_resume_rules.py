"""What a checkpoint restores is compared with what was asked."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from tiny_backbone import sample_rows, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning import ConfigError
from gatera_lightning.cli.main import main
from gatera_lightning.datamodules import MathDataModule
from gatera_lightning.errors import CheckpointError
from gatera_lightning.objectives.description import describe_objectives
from gatera_lightning.training.resume_rules import FREE, check_resume, recorded_settings


@pytest.fixture
def run(tiny_backbone, tmp_path, monkeypatch):
    """A module, its data and a Trainer of 4 steps, as they are before weights are loaded."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    trainer = tiny_trainer(tmp_path, gradient_clip_val=1.0)
    return tiny_module(tiny_backbone, dropout=0.1), tiny_data(tiny_backbone), trainer


@pytest.fixture
def checkpoint(run):
    """What a checkpoint of ``run`` says about it, after step 3 and one epoch."""
    module, data, trainer = run
    return {
        "global_step": 3,
        "loops": {"fit_loop": {"epoch_progress": {"total": {"completed": 1}}}},
        "hyper_parameters": dict(module.hparams),
        "datamodule_hyper_parameters": dict(data.hparams),
        "CommonsenseDataModule": {"train_position": {}},
        "run_settings": recorded_settings(trainer, describe_objectives(module.objectives)),
    }


def change(settings, name, value):
    *sections, last = name.split(".")
    for section in sections:
        settings = settings[section]
    assert last in settings
    settings[last] = value


FIXED = [
    ("hyper_parameters", "optimizer.lr", 0.5, "model.optimizer.lr: 0.01"),
    ("hyper_parameters", "optimizer.weight_decay", 0.1, "model.optimizer.weight_decay: 0.0"),
    ("hyper_parameters", "optimizer.schedule", "cosine", "model.optimizer.schedule: 'linear'"),
    ("hyper_parameters", "optimizer.warmup_steps", 9, "model.optimizer.warmup_steps: 0"),
    ("hyper_parameters", "adapter.dropout", 0.3, "model.adapter.dropout: 0.1"),
    ("hyper_parameters", "adapter.rank", 8, "model.adapter.rank: 4"),
    ("hyper_parameters", "adapter.gate.lr_multiplier", 5.0, "model.adapter.gate.lr_multiplier: 1.0"),
    ("hyper_parameters", "adapter.gate.entropy_weight", 0.5, "model.adapter.gate.entropy_weight: 0.01"),
    ("hyper_parameters", "adapter.gate.bias", 0.5, "model.adapter.gate.bias: "),
    ("hyper_parameters", "backbone.dtype", "bfloat16", "model.backbone.dtype: 'float32'"),
    ("datamodule_hyper_parameters", "train_on", "all", "data.train_on: 'response'"),
    ("datamodule_hyper_parameters", "template", "alpaca", "data.template: 'plain'"),
    ("datamodule_hyper_parameters", "answer_format", "label", "data.answer_format: 'content'"),
    ("datamodule_hyper_parameters", "max_length", 512, "data.max_length: 256"),
    ("datamodule_hyper_parameters", "batch_size", 16, "data.batch_size: 8"),
    ("datamodule_hyper_parameters", "seed", 3, "data.seed: 0"),
    ("datamodule_hyper_parameters", "token_budget", 64, "data.token_budget: null"),
    ("datamodule_hyper_parameters", "group_by_length", True, "data.group_by_length: false"),
    ("datamodule_hyper_parameters", "packing", True, "data.packing: false"),
    ("datamodule_hyper_parameters", "train", ["other"], "data.train: ['everyday[:48]']"),
    ("datamodule_hyper_parameters", "validation", ["other"], "data.validation: ['everyday[:7]']"),
    ("datamodule_hyper_parameters", "held_out", 0.1, "data.held_out: null"),
    ("datamodule_hyper_parameters", "weights", {"everyday": 1.0}, None),
    ("hyper_parameters", "adapter.rank_pattern", {"q_proj": 2}, "model.adapter.rank_pattern: {}"),
    ("hyper_parameters", "adapter.alpha_pattern", {"q_proj": 2.0}, "model.adapter.alpha_pattern: {}"),
    ("run_settings", "seed_everything", 7, "seed_everything: 0"),
    ("run_settings", "trainer.gradient_clip_val", 0.5, "trainer.gradient_clip_val: 1.0"),
    ("run_settings", "trainer.limit_train_batches", 3, "trainer.limit_train_batches: 1.0"),
    ("run_settings", "model.objectives", ["NextToken"], "model.objectives: ['NextToken', 'GateEntropy']"),
    ("run_settings", "model.objectives[1].weight", 0.3, "model.objectives[1].weight: 0.01"),
]


@pytest.mark.parametrize(("entry", "name", "old", "message"), FIXED, ids=[row[1] for row in FIXED])
def test_setting_that_differs_is_refused_with_both_values(run, checkpoint, entry, name, old, message):
    module, data, trainer = run
    check_resume(checkpoint, module, trainer, data, stage="fit")
    if entry == "run_settings":
        checkpoint[entry][name] = old
    else:
        change(checkpoint[entry], name, old)
    if message is None:
        message = f"data.{name}: null"
    with pytest.raises(ConfigError) as caught:
        check_resume(checkpoint, module, trainer, data, stage="fit")
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    there = "true" if old is True else repr(old)
    if isinstance(old, dict):  # YAML writes keys without quotes
        there = re.sub(r"'(\w+)':", r"\1:", there)
    assert f"continues has {there}; accepted: {there}, or a new run without ckpt_path" in problem
    assert "model.warm_start" in problem
    check_resume(checkpoint, module, trainer, data, stage="test")  # uses no setting of training


@pytest.mark.parametrize("stored", [None, "norm", GradClipAlgorithmType.NORM, "value"])
@pytest.mark.parametrize("asked", [None, "norm", "value"])
def test_clipping_by_norm_is_the_default(run, checkpoint, tmp_path, stored, asked):
    module, data, _ = run
    trainer = tiny_trainer(tmp_path, gradient_clip_val=1.0, gradient_clip_algorithm=asked)
    checkpoint["run_settings"]["trainer.gradient_clip_algorithm"] = stored
    here, there = asked or "norm", str(getattr(stored, "value", stored) or "norm")
    if here == there:
        check_resume(checkpoint, module, trainer, data, stage="fit")
        return
    with pytest.raises(ConfigError) as caught:
        check_resume(checkpoint, module, trainer, data, stage="fit")
    assert f"trainer.gradient_clip_algorithm: {here!r}, but " in str(caught.value)
    assert f"has {there!r}; accepted: {there!r}" in str(caught.value)


CHANGED = {
    "model.backbone.revision": "main",
    "model.decoding": {"beams": 3},
    "data.eval_batch_size": 99,
    "data.num_workers": 5,
    "data.evaluate_by": ["generation"],
    "data.rank_validation": True,
    "data.test": ["other"],
    "data.data_dir": "elsewhere",
    "model.adapter.target_modules": [r".*\.q_proj"],
    "model.optimizer.max_skipped_steps": 9,
    "model.backbone.gradient_checkpointing": True,
}


@pytest.mark.parametrize("name", CHANGED)
def test_free_setting_may_change(run, checkpoint, name):
    module, data, trainer = run
    section, _, rest = name.partition(".")
    entry = "hyper_parameters" if section == "model" else "datamodule_hyper_parameters"
    change(checkpoint[entry], rest, CHANGED[name])
    check_resume(checkpoint, module, trainer, data, stage="fit")


def test_free_settings_exist(run):
    """A setting that is renamed must not stay in the table under its old name."""
    module, data, _ = run
    for name in FREE:
        section, _, rest = name.partition(".")
        settings = dict(module.hparams) if section == "model" else dict(data.hparams)
        for part in rest.split("."):
            assert part in settings, name
            settings = settings[part]


def test_every_difference_is_reported_at_once(run, checkpoint):
    module, data, trainer = run
    change(checkpoint["hyper_parameters"], "optimizer.lr", 0.5)
    change(checkpoint["datamodule_hyper_parameters"], "seed", 4)
    with pytest.raises(ConfigError) as caught:
        check_resume(checkpoint, module, trainer, data, stage="fit")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "data.seed",
        "model.optimizer.lr",
    ]


def test_checkpoint_of_another_data_module_is_refused(run, checkpoint):
    module, _, trainer = run
    other = MathDataModule(
        answer_style="gsm8k", template="plain", train_on="response", train=["a"], test=["a"], validation=["a"]
    )
    with pytest.raises(ConfigError, match=r"data\.class_path: 'MathDataModule', .* 'CommonsenseDataModule'"):
        check_resume(checkpoint, module, trainer, other, stage="fit")


@pytest.mark.parametrize(
    ("limits", "name"),
    [({"max_steps": 2}, "trainer.max_steps: 2"), ({"max_epochs": 0, "max_steps": -1}, "trainer.max_epochs")],
)
def test_run_that_ends_before_the_checkpoint_is_refused(run, checkpoint, tmp_path, limits, name):
    module, data, _ = run
    trainer = tiny_trainer(tmp_path, gradient_clip_val=1.0, **limits)
    with pytest.raises(ConfigError, match=re.escape(name)):
        check_resume(checkpoint, module, trainer, data, stage="fit")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_warm_start_beside_a_checkpoint_is_refused(run, checkpoint, stage, tmp_path):
    module, data, trainer = run
    module.warm_start = str(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"model\.warm_start: .* replaces every value of the adapter"):
        check_resume(checkpoint, module, trainer, data, stage=stage)
    checkpoint["hyper_parameters"]["warm_start"] = module.warm_start  # the same command, started again
    check_resume(checkpoint, module, trainer, data, stage=stage)


@pytest.mark.parametrize("missing", ["run_settings", "datamodule_hyper_parameters", "hyper_parameters"])
def test_checkpoint_without_an_entry_is_accepted(run, checkpoint, missing):
    """As those of older versions."""
    module, data, trainer = run
    del checkpoint[missing]
    check_resume(checkpoint, module, trainer, data, stage="fit")


@pytest.mark.parametrize(
    "settings", [{"optimizer": {"speed": 3}}, {"adapter": {"rnak": 1}}, [1], {"optimizer": 3}]
)
def test_unreadable_settings_are_one_sentence(run, checkpoint, settings):
    module, data, trainer = run
    checkpoint["hyper_parameters"] = settings
    with pytest.raises(CheckpointError, match="the settings in the checkpoint cannot be read"):
        check_resume(checkpoint, module, trainer, data, stage="fit")


# --- the command line ---


SCHEDULE = ["--model.optimizer.schedule", "linear", "--model.optimizer.warmup_steps", "0"]


def args(folder, *more):
    validation = ["--trainer.limit_val_batches", "0", "--checkpoint.monitor", "null"]
    return ["fit", "--config", "quickstart.yaml", *tiny_args(folder), *validation, *more]


@pytest.fixture(scope="module")
def last(tiny_backbone, tmp_path_factory):
    """The last checkpoint of a run of three steps with a linear schedule."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(args(tiny_backbone, *SCHEDULE, "--trainer.logger", "false")) == 0
    return root / "checkpoints" / "last.ckpt"


def test_other_learning_rate_is_refused_before_weights_are_loaded(
    tiny_backbone, last, tmp_path, monkeypatch, capsys
):
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    flags = ["--trainer.max_steps", "5", "--ckpt_path", str(last), "--seed_everything", "1"]
    assert main(args(tiny_backbone, *flags, "--model.optimizer.lr", "1e-4")) == 2
    error = capsys.readouterr().err
    assert "model.optimizer.lr: 0.0001, but the run that the checkpoint continues has " in error
    assert "seed_everything: 1, but the run that the checkpoint continues has 0" in error


# --- the examples ---


def sources(folder):
    return [
        *("--data.init_args.train", f'["{folder}/train.json"]'),
        *("--data.init_args.validation", f'["{folder}/validation.json"]'),
    ]


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A folder ``mine`` with some of the sample data, in an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for split, count in (("train", 48), ("validation", 7)):
        write_rows(split, sample_rows(split)[:count])
    return tmp_path / "mine"


def write_rows(split, rows):
    Path("mine", f"{split}.json").write_text(json.dumps(rows))


@pytest.fixture
def interrupted(tiny_backbone, own_data):
    """The last checkpoint of two of three steps on ``mine``."""
    flags = ["--trainer.logger", "false", *SCHEDULE, "--model.optimizer.schedule", "constant"]
    assert main(args(tiny_backbone, *flags, *sources("mine"), "--trainer.max_steps", "2")) == 0
    return shutil.copy("checkpoints/last.ckpt", "two.ckpt")


def resume(tiny_backbone, path, folder, *more):
    flags = ["--trainer.logger", "false", *SCHEDULE, "--model.optimizer.schedule", "constant"]
    root = ["--trainer.default_root_dir", "resumed"]
    return main(args(tiny_backbone, *flags, *sources(folder), "--ckpt_path", path, *root, *more))


def test_moved_data_resume(tiny_backbone, own_data, interrupted):
    """The same examples elsewhere give the same adapter."""
    assert resume(tiny_backbone, interrupted, "mine") == 0
    expected = Path("resumed/checkpoints/last/adapter_model.safetensors").read_bytes()
    shutil.rmtree("resumed")
    own_data.rename("renamed")
    assert resume(tiny_backbone, interrupted, "renamed") == 0
    assert Path("resumed/checkpoints/last/adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("split", ["train", "validation"])
def test_changed_examples_of_the_same_name_are_refused(
    tiny_backbone, own_data, interrupted, capsys, monkeypatch, split
):
    """Another right answer to the last question: its text, and so its place in the data, is the same."""
    from transformers import AutoModelForCausalLM

    rows = json.loads((own_data / f"{split}.json").read_text())
    rows[-1]["answer"] = "answer1" if rows[-1]["answer"] != "answer1" else "answer2"
    write_rows(split, rows)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    assert resume(tiny_backbone, interrupted, "mine") == 2
    error = capsys.readouterr().err
    assert f"data.{split}: the examples of ['mine/{split}.json'] (SHA-256 " in error
    assert "are not those of the run that the checkpoint continues (SHA-256 " in error
    assert "accepted: the same examples, or a new run without ckpt_path" in error


def test_changed_examples_elsewhere_are_refused_by_their_names(tiny_backbone, own_data, interrupted, capsys):
    write_rows("train", sample_rows("train")[1:49])
    own_data.rename("renamed")
    assert resume(tiny_backbone, interrupted, "renamed") == 2
    error = capsys.readouterr().err
    assert (
        "data.train: ['renamed/train.json'], but the run that the checkpoint continues has ['mine/" in error
    )
    assert "data.validation" not in error


def test_checkpoint_of_an_earlier_version_compares_names(tiny_backbone, own_data, interrupted, capsys):
    checkpoint = torch.load(interrupted, weights_only=True)
    assert len(checkpoint["CommonsenseDataModule"].pop("examples")) == 2
    torch.save(checkpoint, interrupted)
    own_data.rename("renamed")
    assert resume(tiny_backbone, interrupted, "renamed") == 2
    assert "data.train: ['renamed/train.json'], but" in capsys.readouterr().err
    Path("renamed").rename("mine")
    assert resume(tiny_backbone, interrupted, "mine") == 0


def test_changed_examples_are_refused_under_a_hand_written_trainer(tiny_backbone, tmp_path):
    first = tiny_data(tiny_backbone)
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.fit(tiny_module(tiny_backbone), datamodule=first)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    other = tiny_data(tiny_backbone)
    other.hparams["train"] = other.sources["train"] = ["everyday[1:49]"]
    other.hparams["train"] = first.hparams["train"]
    trainer = tiny_trainer(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.train: the examples of \['everyday\[:48\]'\] \(SHA-256"):
        trainer.fit(tiny_module(tiny_backbone), datamodule=other, ckpt_path=tmp_path / "two.ckpt")


# --- the choice among the examples ---


def test_what_weights_and_held_out_examples_choose_is_compared(tiny_backbone, own_data):
    """Sources are renamed, numbers are written in another way: what counts is which examples are used."""
    for name, rows in (("a", sample_rows("train")[:16]), ("b", sample_rows("train")[16:48])):
        (own_data / f"{name}.json").write_text(json.dumps(rows))
    Path("moved").mkdir()
    shutil.copy("mine/a.json", "moved/b.json")
    shutil.copy("mine/b.json", "moved/a.json")
    tens = {"a": 10, "b": 10}

    def data(folder="mine", names="ab", validation=12, weights=tens):
        files = [f"{folder}/{name}.json" for name in names]
        return tiny_data(tiny_backbone, train=files, validation=validation, weights=weights)

    trainer = tiny_trainer(".", max_steps=2)
    trainer.fit(tiny_module(tiny_backbone), datamodule=data())
    trainer.save_checkpoint("two.ckpt")

    def resumed(**settings):
        trainer = tiny_trainer(".", max_steps=2)
        trainer.fit(tiny_module(tiny_backbone), datamodule=data(**settings), ckpt_path="two.ckpt")

    resumed(weights={"a": 0.5, "b": 0.5}, validation=0.25)
    resumed(folder="moved", names="ba", weights={"b": 10, "a": 10})
    for settings, message in (
        ({"weights": {"a": 1, "b": 3}}, r"data\.weights: {a: 1, b: 3}, but the run .* has {a: 10, b: 10}"),
        ({"weights": None}, r"data\.weights: null, but"),
        (
            {"folder": "moved", "names": "ba"},
            r"data\.weights: {a: 10, b: 10} chooses other training examples here \(SHA-256",
        ),
        ({"validation": 13}, r"data\.validation: 13, but the run that the checkpoint continues has 12"),
    ):
        with pytest.raises(ConfigError, match=message):
            resumed(**settings)
    checkpoint = torch.load("two.ckpt", weights_only=True)
    del checkpoint["CommonsenseDataModule"]["choice"]  # as an earlier version wrote it
    torch.save(checkpoint, "two.ckpt")
    resumed()
    with pytest.raises(ConfigError, match=r"data\.weights: {a: 0\.5, b: 0\.5}, but the run"):
        resumed(weights={"a": 0.5, "b": 0.5})


# --- the schedule ---


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_longer_run_says_what_its_schedule_does(tiny_backbone, last, tmp_path, monkeypatch, caplog, schedule):
    """The checkpoint's learning rate is the one after the last step of its own run."""
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(last, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [0, 0]
    optimizer = checkpoint["hyper_parameters"]["optimizer"]
    if schedule == "constant":
        optimizer["schedule"] = "constant"
        for group in groups:
            group["lr"] = group["initial_lr"]
    torch.save(checkpoint, "last.ckpt")
    flags = ["--trainer.logger", "false", "--trainer.max_steps", "5", "--trainer.max_epochs", "5"]
    flags += [*SCHEDULE, "--model.optimizer.schedule", schedule, "--ckpt_path", "last.ckpt"]
    assert main(args(tiny_backbone, *flags)) == 0
    warned = "the run now ends at step 5" in caplog.text
    assert warned == (schedule == "linear")
    expected = f"step 4 uses the checkpoint's learning rate of 0, which is {0.4 * optimizer['lr']:.3g} in a"
    assert (expected in caplog.text) == warned
