"""Problems of a configuration: all at once, before anything is loaded, with what is accepted."""

import importlib.util
import json

import pytest
import torch
import yaml
from tiny_backbone import sample_rows

from gatera_lightning.cli.main import main
from gatera_lightning.training import logger_checks

INVALID = [
    *("--model.adapter.rank", "-1", "--model.adapter.alpha", "3", "--model.optimizer.lr", "0"),
    *("--model.adapter.gate.entropy_weight", "-1", "--model.warm_start", "nowhere"),
    *("--data.init_args.train", "[nothing]", "--data.init_args.batch_size", "0"),
    *("--trainer.precision", "16-mixed", "--trainer.use_distributed_sampler", "true"),
    *("--trainer.strategy", "fsdp", "--trainer.val_check_interval", "00:00:10:00"),
]
REPORTED = [
    *("model.adapter.rank", "model.adapter.alpha", "model.adapter.gate.entropy_weight", "model.optimizer.lr"),
    *("model.warm_start", "data.batch_size", "data.train", "trainer.precision", "trainer.val_check_interval"),
    *("trainer.use_distributed_sampler", "trainer.strategy"),
]


@pytest.mark.parametrize("more", [[], ["--print_config"], ["--print_config=skip_null"]], ids=str)
def test_all_problems_are_reported_at_once(fit, problems, no_loading, working_folder, more):
    reported = problems(*fit, *INVALID, *more)
    assert sorted(line.partition(":")[0] for line in reported) == sorted(REPORTED)
    assert all("accepted: " in line for line in reported)
    assert list(working_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("gate_histogram.every_n_steps", "-1", "accepted: at least 1, or 0 for never"),
        ("throughput.every_n_steps", "-1", "accepted: at least 1, or 0 for never"),
        ("model.backbone.id", "package:no_such_package.part", "the Python package no_such_package.part"),
        ("model.adapter.update", "best", "accepted: lora, dora, hira"),
        ("checkpoint.monitor", "val/f1", "'val/f1' is never logged; accepted: val/loss, val/accuracy_"),
        ("checkpoint.monitor", "val/accuracy_sum", "logged only with data.rank_validation: true"),
        ("trainer.strategy", "{class_path: ModelParallelStrategy}", "AdapterShardingStrategy"),
    ],
)
def test_problem_of_any_section_is_reported_with_the_others(fit, problems, no_loading, flag, value, message):
    ranking = ["--data.init_args.rank_validation", "false"]
    reported = problems(*fit, *ranking, f"--{flag}", value, "--model.adapter.rank", "-1")
    assert len(reported) == 2
    assert any(message in line for line in reported)
    assert any(line.startswith("model.adapter.rank: -1") for line in reported)


def test_sharding_is_checked_against_the_number_of_ranks(fit, problems, no_loading):
    sizes = ["--trainer.devices", "4", "--trainer.strategy.init_args.replicate_size", "3"]
    (problem,) = problems(*fit, "--config", "overlays/fsdp.yaml", *sizes)
    assert problem.startswith("trainer.strategy.replicate_size: 3 does not divide the 4 ")


def test_decoding_thresholds_are_rejected_with_sharded_weights(fit, problems, no_loading):
    flags = ["--config", "overlays/fsdp.yaml", "--model.decoding.skip_below", "0.1"]
    (problem,) = problems(*fit, *flags)
    assert problem.startswith("model.decoding.skip_below: 0.1, merge_above: 1.0, with sharded weights")


@pytest.mark.parametrize("name", ["nowhere.ckpt", "empty"])
def test_checkpoint_that_does_not_exist_is_reported(fit, problems, no_loading, working_folder, name):
    (working_folder / "empty").mkdir()
    (problem,) = problems(*fit, "--ckpt_path", name)
    assert problem.startswith("ckpt_path: ")
    assert repr(name) in problem
    assert "accepted: a checkpoint, a folder of checkpoints, last" in problem


def test_invalid_checkpoint_mode_lists_the_valid_ones(fit, parser_error):
    error = parser_error(*fit, "--checkpoint.mode", "highest")
    assert all(word in error for word in ("checkpoint.mode", "min", "max", "highest"))


def test_type_error_names_the_setting(fit, parser_error):
    error = parser_error(*fit, "--model.adapter.rank", "many")
    assert error == "model.adapter.rank: 'many'; accepted: an integer"


@pytest.mark.parametrize(
    ("flag", "accepted"),
    [
        ("model.optimizer.schedule", ("linear", "cosine", "constant")),
        ("data.init_args.template", ("alpaca", "plain")),
    ],
)
def test_invalid_choice_lists_the_valid_ones(fit, parser_error, flag, accepted):
    error = parser_error(*fit, f"--{flag}", "best")
    assert flag.rpartition(".")[2] in error
    assert all(value in error for value in accepted)


def test_unknown_gate_names_what_is_accepted(fit, problems):
    assert problems(*fit, "--model.adapter.gate", "tokn") == [
        "model.adapter.gate: 'tokn' is unknown; accepted: none, static, token, hard, threshold, position; "
        "did you mean 'token'?"
    ]


@pytest.mark.parametrize("missing", ["train_on", "answer_format"])
def test_settings_without_a_default_must_be_given(working_folder, problems, missing):
    settings = {"template": "plain", "answer_format": "content", "train_on": "response"}
    del settings[missing]
    data = {"class_path": "gatera_lightning.datamodules.CommonsenseDataModule", "init_args": settings}
    (working_folder / "mine.yaml").write_text(yaml.safe_dump({"data": data}))
    reported = problems("fit", "--config", "mine.yaml")
    assert any(line.startswith(f"data.{missing}: is not set; accepted: ") for line in reported)


def test_unknown_setting_is_rejected(working_folder, recipe, parser_error):
    (working_folder / "mine.yaml").write_text("model: {adapter: {rnak: 4}}\n")
    assert "rnak" in parser_error("fit", *recipe, "--config", "mine.yaml")


def test_optimizer_has_no_second_place(fit, parser_error):
    """LightningCLI's own --optimizer would silently replace model.optimizer."""
    assert "--optimizer" in parser_error(*fit, "--optimizer", "SGD", "--optimizer.lr", "0.1")


def test_targets_are_checked_without_weights(fit, problems, no_loading):
    flags = ["--model.adapter.target_modules", "[q_proj, nothing]", "--model.adapter.layers", "[0, 9]"]
    error = "\n".join(problems(*fit, *flags))
    assert "'nothing' matches no linear layer; this model has q_proj × 2" in error
    assert "adapter.layers: [9] do not exist" in error


def test_text_for_target_modules_is_rejected(fit, parser_error):
    error = parser_error(*fit, "--model.adapter.target_modules", "all_linear")
    assert "accepted: a list, such as '[a, b]', all-linear; did you mean 'all-linear'?" in error


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("exclude_modules", "[o_prj]", "adapter.exclude_modules: 'o_prj' matches no linear layer"),
        ("rank_pattern", "{q_prj: 4}", "did you mean 'q_proj'?"),
        ("rank_pattern", "{q_proj: 99}", "adapter.rank_pattern.q_proj: 99 exceeds model.layers.0.self_attn"),
        ("rank_pattern", "{q_proj: 0}", "adapter.rank_pattern.q_proj: 0; accepted: an integer of at least 1"),
        ("alpha_pattern", "{q_proj: 2}", "update 'hira' has no scale"),
        ("layers", "[-3]", "adapter.layers: [-3] do not exist; the model's decoder layers are 0…1"),
    ],
)
def test_patterns_are_checked_without_weights(fit, problems, no_loading, flag, value, expected):
    assert expected in "\n".join(problems(*fit, f"--model.adapter.{flag}={value}"))


def test_missing_gpu_is_reported_with_the_cpu_overlay(fit, problems):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (problem,) = problems(*fit, "--trainer.accelerator", "gpu")
    assert "add --config overlays/cpu.yaml" in problem


def test_hub_id_without_network_is_reported(fit, problems):
    (problem,) = problems(*fit, "--model.backbone.id", "nobody/no-such-model")
    assert problem.startswith("backbone.id: cannot ")
    assert "'nobody/no-such-model'" in problem
    assert "local folder" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "answer9"}, "field 'answer': 'answer9' is not one of the options"),
        ({"instruction": "Why?"}, "field 'instruction': expected a last line 'Answer format"),
        ({"input": "more"}, "field 'input' is 'more'; expected nothing"),
    ],
    ids=["answer", "instruction", "input"],
)
def test_malformed_example_is_named_before_weights_are_loaded(
    fit, working_folder, capsys, no_weights, change, message
):
    rows = sample_rows("train")[:20]
    rows[16] |= change
    (working_folder / "rows.json").write_text(json.dumps(rows))
    assert main([*fit, "--data.init_args.train", "[rows.json]"]) == 2
    assert f"rows.json, row 17: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["test", "fit"])
def test_folder_without_adapter_is_reported(recipe, problems, working_folder, subcommand):
    (working_folder / "empty").mkdir()
    (problem,) = problems(subcommand, *recipe, "--model.warm_start", "empty")
    assert "adapter_config.json is missing" in problem


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_logger_whose_package_is_missing_says_what_to_install(fit, problems, no_loading, monkeypatch, extra):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        logger_checks, "find_spec", lambda name, *rest: None if name == extra else found(name, *rest)
    )
    name = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger"}[extra]
    (problem,) = problems(*fit, "--trainer.logger", f"{{class_path: lightning.pytorch.loggers.{name}}}")
    assert problem == (
        f"trainer.logger: {name} needs the package {extra}, which is not installed: "
        f"pip install 'gatera-lightning[{extra}]'"
    )
