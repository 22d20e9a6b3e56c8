"""The command line: configs found from anywhere, problems said at once and early, runs that end as promised."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_backbone import run_program, sample_rows, tiny_args

import gatera_lightning.cli.lightning_cli
import gatera_lightning.training.model_loading
from gatera_lightning import ConfigError, GateRAModule
from gatera_lightning.cli.lightning_cli import find_config, with_found_configs
from gatera_lightning.cli.main import main

SHIPPED = Path(find_config("quickstart.yaml")).parent
DATA = """
data:
  class_path: gatera_lightning.datamodules.CommonsenseDataModule
  init_args: {template: plain, answer_format: content, train_on: response}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def args(tiny_backbone):
    """A tiny ``fit``; flags may follow."""
    return ["fit", "--config", "quickstart.yaml", *tiny_args(tiny_backbone)]


def without_weights(monkeypatch):
    """Loading anything is an error from now on."""

    def loaded(*_):
        raise AssertionError("weights or tokenizer were loaded")

    monkeypatch.setattr(gatera_lightning.training.model_loading, "load_backbone", loaded)
    monkeypatch.setattr(gatera_lightning.cli.lightning_cli, "load_tokenizer", loaded)


def refused(capsys, *args):
    """Standard error of a command line that the parser refuses."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    return capsys.readouterr().err


def printed_config(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main([*args, "--print_config"])
    assert caught.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


# --- configs by name ---


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("quickstart.yaml", "quickstart.yaml"),
        ("llama_commonsense.yaml", "llama_commonsense.yaml"),
        ("overlays/lora.yaml", "overlays/lora.yaml"),
        ("lora.yaml", "overlays/lora.yaml"),
        ("fsdp.yaml", "overlays/fsdp.yaml"),
    ],
)
def test_shipped_configs_are_found_by_name(name, path):
    found = Path(find_config(name))
    assert found == SHIPPED / path
    assert found.is_file()


@pytest.mark.parametrize(
    "spelling", [["--config", "lora.yaml"], ["--config=lora.yaml"], ["-c", "lora.yaml"]], ids=" ".join
)
def test_every_spelling_of_the_option(spelling):
    found = with_found_configs(["fit", *spelling, "--model.adapter.rank", "4"])
    assert found == ["fit", "--config", str(SHIPPED / "overlays" / "lora.yaml"), "--model.adapter.rank", "4"]


def test_a_file_of_ones_own_wins(elsewhere):
    (elsewhere / "lora.yaml").write_text("seed_everything: 7\n")
    assert find_config("lora.yaml") == "lora.yaml"
    assert find_config("./lora.yaml") == "./lora.yaml"


def test_a_folder_of_ones_own_does_not_hide_a_config(elsewhere):
    (elsewhere / "lora.yaml").mkdir()
    (elsewhere / "cli_configs").mkdir()
    (elsewhere / "cli_configs" / "quickstart.yaml").write_text("nonsense")
    assert Path(find_config("quickstart.yaml")) == SHIPPED / "quickstart.yaml"
    assert Path(find_config("lora.yaml")) == SHIPPED / "overlays" / "lora.yaml"


def test_an_unknown_config_lists_the_shipped_ones(capsys):
    assert main(["fit", "--config", "quickstrat.yaml"]) == 2
    error = capsys.readouterr().err
    assert "--config: 'quickstrat.yaml' is neither a file nor a shipped config" in error
    for path in SHIPPED.rglob("*.yaml"):
        assert str(path.relative_to(SHIPPED)) in error


def test_later_configs_win_and_flags_win_over_all(elsewhere, capsys, tiny_backbone):
    (elsewhere / "mine.yaml").write_text(
        f"model: {{adapter: {{rank: 8, dropout: 0.1}}, optimizer: {{lr: 0.5}}, backbone: {{id: {tiny_backbone}}}}}"
    )
    configs = ["fit", "-c", "quickstart.yaml", "--config=lora.yaml", "--config", "mine.yaml"]
    model = printed_config(capsys, *configs, "--model.adapter.dropout", "0.2")["model"]
    assert (model["adapter"]["update"], model["adapter"]["gate"]) == (
        "lora",
        "none",
    )  # lora.yaml over quickstart.yaml
    assert model["adapter"]["rank"] == 8  # mine.yaml over quickstart.yaml
    assert model["adapter"]["dropout"] == 0.2  # flag over mine.yaml
    assert model["optimizer"]["lr"] == 0.5  # mine.yaml over lora.yaml
    assert model["optimizer"]["warmup_steps"] == 10  # quickstart.yaml over the default of 100
    assert model["optimizer"]["weight_decay"] == 0.0  # the default
    assert model["backbone"]["id"] == str(tiny_backbone)


def test_the_order_of_configs_matters(elsewhere, capsys, tiny_backbone):
    (elsewhere / "mine.yaml").write_text(
        f"model: {{optimizer: {{lr: 0.5}}, backbone: {{id: {tiny_backbone}}}}}"
    )
    configs = ["fit", "--config", "quickstart.yaml", "--config", "mine.yaml", "--config", "lora.yaml"]
    assert printed_config(capsys, *configs)["model"]["optimizer"]["lr"] == 2e-3


def test_a_flag_before_a_config_wins_too(args, capsys):
    flags = ["--model.adapter.rank", "3", "--model.backbone.id", args[4]]
    model = printed_config(capsys, "fit", *flags, "--config", "quickstart.yaml")["model"]
    assert (model["adapter"]["rank"], model["backbone"]["id"]) == (3, args[4])


# --- problems ---

BAD = [
    *("--model.adapter.rank", "-1", "--model.adapter.alpha", "3", "--model.optimizer.lr", "0"),
    *("--model.gate_entropy_weight", "-1", "--model.warm_start", "nowhere"),
    *("--data.init_args.train", "[nothing]", "--data.init_args.batch_size", "0"),
    *(
        "--trainer.precision",
        "16-mixed",
        "--trainer.use_distributed_sampler",
        "true",
        "--trainer.strategy",
        "fsdp",
    ),
    *("--trainer.val_check_interval", "00:00:10:00"),
]
SAID = [
    "model.adapter.rank: -1",
    "model.adapter.alpha: 3.0",
    "model.optimizer.lr: 0.0",
    "model.gate_entropy_weight: -1.0",
    "model.warm_start: nowhere: no adapter here",
    "data.batch_size: 0",
    "data.train: task 'nothing'",
    "trainer.precision: '16-mixed'",
    "trainer.val_check_interval: a time",
    "trainer.use_distributed_sampler: true",
    "trainer.strategy: 'fsdp'",
]


@pytest.mark.parametrize("more", [[], ["--print_config"], ["--print_config=skip_null"]], ids=str)
def test_all_problems_at_once_before_any_weight_is_loaded(args, capsys, monkeypatch, elsewhere, more):
    without_weights(monkeypatch)
    assert main([*args, *BAD, *more]) == 2
    out, error = capsys.readouterr()
    assert f"{len(SAID)} problems in the configuration:" in error
    lines = [line.removeprefix("  - ") for line in error.splitlines() if line.startswith("  - ")]
    assert len(lines) == len(SAID)
    for said in SAID:
        (line,) = (line for line in lines if line.startswith(said))
        assert "accepted: " in line
    assert out == ""
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("gate_histogram.every_n_steps", "-1", "accepted: at least 1, or 0 for never"),
        ("throughput.every_n_steps", "-1", "accepted: at least 1, or 0 for never"),
        (
            "model.backbone.id",
            "package:no_such_package.part",
            "needs the Python package no_such_package.part",
        ),
    ],
)
def test_a_problem_of_any_section_is_a_configuration_problem(args, capsys, monkeypatch, flag, value, said):
    without_weights(monkeypatch)
    assert main([*args, f"--{flag}", value, "--model.adapter.rank", "-1"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "model.adapter.rank: -1" in error


def test_a_wrong_mode_of_the_checkpoint_lists_the_right_ones(args, capsys):
    """As a type or as a problem, but not as a traceback."""
    try:
        status = main([*args, "--checkpoint.mode", "highest"])
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert all(word in error for word in ("checkpoint.mode", "min", "max", "highest"))


def test_a_type_error_names_the_dotted_key(args, capsys):
    error = refused(capsys, *args, "--model.adapter.rank", "many")
    assert 'Parser key "model.adapter.rank"' in error
    assert "Expected a <class 'int'>. Got value: many" in error


@pytest.mark.parametrize(
    ("flag", "accepted"),
    [
        ("model.adapter.update", ("lora", "dora", "hira")),
        ("model.adapter.gate", ("none", "static", "token")),
        ("model.optimizer.schedule", ("linear", "cosine", "constant")),
        ("data.init_args.template", ("alpaca", "plain")),
    ],
)
def test_a_closed_choice_lists_its_values(args, capsys, flag, accepted):
    error = refused(capsys, *args, f"--{flag}", "best")
    assert flag.rpartition(".")[2] in error
    assert all(repr(value) in error for value in accepted)


@pytest.mark.parametrize("missing", ["train_on", "answer_format"])
def test_what_the_loss_is_computed_on_must_be_said(elsewhere, capsys, missing):
    settings = {"template": "plain", "answer_format": "content", "train_on": "response"}
    del settings[missing]
    config = {
        "data": {"class_path": "gatera_lightning.datamodules.CommonsenseDataModule", "init_args": settings}
    }
    (elsewhere / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "mine.yaml"]) == 2
    assert f"data.{missing}: is not set; accepted: " in capsys.readouterr().err


def test_an_unknown_setting_is_refused(elsewhere, capsys):
    (elsewhere / "mine.yaml").write_text(DATA + "model: {adapter: {rnak: 4}}\n")
    assert "rnak" in refused(capsys, "fit", "--config", "mine.yaml")


def test_help_shows_what_every_setting_means(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for said in (
        "Rank r of B A; at most the smaller side of every adapted weight.",
        "Peak learning rate of the update's parameters.",
        "Hub id, local folder, .gguf file, or package:NAME",
        "λ of the entropy term, which pushes gates towards 0 or 1",
        "Logged value that decides which checkpoint is best",
        "Optimizer steps between two histograms; 0 switches them off.",
        "Optimizer steps between two readings; 0 switches them off.",
    ):
        assert said in text


def test_there_is_no_second_place_for_the_optimizer(args, capsys):
    """LightningCLI's own --optimizer would silently take the place of model.optimizer."""
    assert "--optimizer" in refused(capsys, *args, "--optimizer", "SGD", "--optimizer.lr", "0.1")


def test_help_names_the_projects_own_verbs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "demo" in capsys.readouterr().out


def test_a_first_word_that_is_no_verb(capsys):
    assert "'fit', 'validate', 'test', 'predict'" in refused(capsys, "train")


# --- runs ---


@pytest.fixture(scope="module")
def runs(tiny_backbone, tmp_path_factory):
    """The folder in which ``fit`` ran twice, and the first run's files as they were before the second."""
    root = tmp_path_factory.mktemp("runs")
    args = [
        "fit",
        "--config",
        "quickstart.yaml",
        *tiny_args(tiny_backbone),
        "--gate_histogram.every_n_steps",
        "1",
    ]
    with contextlib.chdir(root):
        assert main(args) == 0
        first = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert main(args) == 0
    return root, first


def test_a_second_run_overwrites_nothing(runs):
    root, first = runs
    assert sorted(path.name for path in (root / "runs" / "quickstart").iterdir()) == [
        "version_0",
        "version_1",
    ]
    assert {path: path.read_bytes() for path in first} == first
    versions = [root / "runs" / "quickstart" / f"version_{i}" for i in (0, 1)]
    kept = [{str(path.relative_to(v)).partition("tfevents")[0] for path in v.rglob("*")} for v in versions]
    assert kept[0] == kept[1]
    assert {"config.yaml", "checkpoints/last.ckpt", "checkpoints/last/adapter_model.safetensors"} <= kept[0]


def test_the_same_seed_gives_the_same_adapter(runs):
    root, _ = runs
    adapters = [
        load_file(
            root
            / "runs"
            / "quickstart"
            / f"version_{i}"
            / "checkpoints"
            / "last"
            / "adapter_model.safetensors"
        )
        for i in (0, 1)
    ]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_a_run_can_be_repeated_from_its_own_config(runs, capsys):
    root, _ = runs
    config = root / "runs" / "quickstart" / "version_0" / "config.yaml"
    assert printed_config(capsys, "fit", "--config", str(config)) == yaml.safe_load(config.read_text())


def test_a_module_loads_from_a_checkpoint_of_the_command_line(runs, tiny_backbone):
    root, _ = runs
    checkpoints = root / "runs" / "quickstart" / "version_0" / "checkpoints"
    module = GateRAModule.load_from_checkpoint(checkpoints / "last.ckpt", map_location="cpu")
    assert (module.adapter.rank, module.backbone.id) == (4, str(tiny_backbone))
    parameters = dict(module.model.named_parameters())
    saved = load_file(checkpoints / "last" / "adapter_model.safetensors")
    assert all(torch.equal(parameters[name], saved[name]) for name in saved)


def test_test_with_a_trained_adapter(runs, args, elsewhere, capsys):
    root, _ = runs
    adapter = root / "runs" / "quickstart" / "version_0" / "checkpoints" / "last"
    assert main(["test", *args[1:], "--model.warm_start", str(adapter)]) == 0
    trained = json.loads((elsewhere / "runs/quickstart/version_0/test_results.json").read_text())
    assert trained["tasks"]["everyday"]["sum"]["n"] == 6
    out = capsys.readouterr().out
    assert "accuracy [95 % interval]" in out
    assert f"{trained['nats_per_target_token']:.4f} nats per token" in out
    assert "test/accuracy_sum" not in out  # the table says it once
    assert main(["test", *args[1:]]) == 0
    untrained = json.loads((elsewhere / "runs/quickstart/version_1/test_results.json").read_text())
    assert trained["nats_per_target_token"] < untrained["nats_per_target_token"]
    assert main(["test", *args[1:], "--ckpt_path", f"{adapter}.ckpt"]) == 0
    again = json.loads((elsewhere / "runs/quickstart/version_2/test_results.json").read_text())
    assert {key: again[key] for key in ("tasks", "average", "identity")} == {
        key: trained[key] for key in ("tasks", "average", "identity")
    }


def test_predict_and_validate(runs, args, elsewhere, capsys):
    root, _ = runs
    adapter = ["--model.warm_start", str(root / "runs" / "quickstart" / "version_0" / "checkpoints" / "last")]
    assert main(["predict", *args[1:], *adapter]) == 0
    path = Path("runs/quickstart/version_0/predictions.jsonl")
    assert f"6 predictions: {path}" in capsys.readouterr().out
    assert [json.loads(line)["example"] for line in path.read_text().splitlines()] == list(range(6))
    assert main(["validate", *args[1:], *adapter]) == 0
    assert "val/loss" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["test", "fit"])
def test_a_folder_without_an_adapter_is_a_configuration_problem(args, elsewhere, capsys, verb):
    (elsewhere / "empty").mkdir()
    assert main([verb, *args[1:], "--model.warm_start", "empty"]) == 2
    assert "adapter_config.json is missing" in capsys.readouterr().err


def test_an_adapter_of_another_shape_is_a_configuration_problem(runs, args, capsys):
    root, _ = runs
    adapter = root / "runs" / "quickstart" / "version_0" / "checkpoints" / "last"
    assert main(["test", *args[1:], "--model.warm_start", str(adapter), "--model.adapter.rank", "2"]) == 2
    assert "has rank 4, but model.adapter.rank is 2" in capsys.readouterr().err


def test_resuming_continues_the_step_count(runs, args):
    root, _ = runs
    checkpoint = root / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3
    more = ["--trainer.max_steps", "5", "--trainer.max_epochs", "5", "--ckpt_path", str(checkpoint)]
    assert main([*args, *more]) == 0
    resumed = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 5
    assert all(int(state["step"]) == 5 for state in resumed["optimizer_states"][0]["state"].values())
    assert resumed["lr_schedulers"][0]["last_epoch"] == 5


def test_a_checkpoint_that_is_not_there_is_a_configuration_problem(args, capsys, monkeypatch):
    without_weights(monkeypatch)
    assert main([*args, "--ckpt_path", "nowhere.ckpt"]) == 2
    assert "ckpt_path: 'nowhere.ckpt'" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(args, capsys):
    """A step at lr 1e30 is taken; the next loss is not a number. The checkpoint in between stays."""
    flags = ["--model.optimizer.lr", "1e30", "--model.optimizer.warmup_steps", "0"]
    flags += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "2"]
    assert main([*args, *flags]) == 1
    error = capsys.readouterr().err
    assert "the loss of optimizer step 1 is nan" in error
    ids = [
        int(i)
        for i in re.search(r"example ids of the micro-batches concerned: \[(.*?)\]", error)[1].split(", ")
    ]
    assert 8 <= len(set(ids)) <= 16  # of one micro-batch at least
    assert set(ids) <= set(range(48))
    assert "optimizer.lr too large (1e+30)" in error
    assert "Traceback" not in error
    checkpoint = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


def test_a_hub_id_without_network_says_what_would_work(args, capsys):
    assert main([*args, "--model.backbone.id", "nobody/no-such-model"]) == 2
    error = capsys.readouterr().err
    assert "backbone.id: cannot fetch 'nobody/no-such-model' from the hub" in error
    assert "Without network, give a local folder" in error


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "answer9"}, "field 'answer': 'answer9' is not among the options"),
        ({"instruction": "Why?"}, "field 'instruction': expected a last line 'Answer format"),
        ({"input": "more"}, "field 'input' is 'more'; expected nothing"),
    ],
    ids=["answer", "instruction", "input"],
)
def test_a_malformed_row_is_named_before_weights_are_loaded(
    args, elsewhere, capsys, monkeypatch, change, said
):
    monkeypatch.setattr(
        gatera_lightning.training.model_loading, "load_backbone", lambda _: pytest.fail("weights were loaded")
    )
    rows = sample_rows("train")[:20]
    rows[16] |= change
    (elsewhere / "rows.json").write_text(json.dumps(rows))
    assert main([*args, "--data.init_args.train", "[rows.json]"]) == 2
    assert f"rows.json, row 17: {said}" in capsys.readouterr().err


def test_rows_of_a_task_may_be_limited_as_documented(args, capsys, tiny_backbone):
    data = printed_config(capsys, *args, "--data.init_args.train", '["everyday[:48]"]')["data"]
    assert data["init_args"]["train"] == ["everyday[:48]"]


def test_the_debug_overlay_serves_every_verb(args, elsewhere):
    """What debug.yaml promises: two batches of every evaluation."""
    debug = [
        "--config",
        "quickstart.yaml",
        "--config",
        "debug.yaml",
        *args[3:],
        "--data.init_args.eval_batch_size",
        "7",
    ]
    assert main(["test", *debug]) == 0
    assert main(["predict", *debug]) == 0


def test_targets_that_match_nothing_are_told_from_the_model_s_config_alone(
    args, capsys, monkeypatch, elsewhere
):
    without_weights(monkeypatch)
    flags = ["--model.adapter.target_modules", "[q_proj, nothing]", "--model.adapter.layers", "[0, 9]"]
    assert main([*args, *flags]) == 2
    error = capsys.readouterr().err
    assert "'nothing' matches no linear layer; this model has q_proj × 2" in error
    assert "adapter.layers: [9] do not exist" in error


def test_no_gpu_says_what_to_do(args, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([*args, "--trainer.accelerator", "gpu"]) == 2
    assert "add --config overlays/cpu.yaml" in capsys.readouterr().err


# --- demo ---


def test_demo_compares_before_and_after(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    steps = ["--trainer.max_steps", "12", "--trainer.max_epochs", "4", "--model.optimizer.warmup_steps", "0"]
    assert main(["demo", *args[3:], *steps]) == 0
    out = capsys.readouterr().out
    table = out[out.index("GateRA in a few minutes") :]
    assert "before" in table
    assert "after" in table
    before, after = map(
        float, re.search(r"nats per target token\s*│\s*([\d.]+)\s*│\s*([\d.]+)", table).groups()
    )
    assert after < before
    assert re.search(r"accuracy, per-token likelihood\s*│\s*[\d.]+ \[[\d.]+, [\d.]+\]\s*│", table)
    adapter = Path(re.search(r"adapter: +(\S+)", table)[1])
    assert (adapter / "adapter_model.safetensors").is_file()
    folder = Path(re.search(r"tensorboard --logdir (\S+)", table)[1])
    assert list(folder.glob("events.out.tfevents.*"))


def test_demo_without_a_validation_says_what_it_can(args, capsys):
    """Stopped before the first validation, there is no best checkpoint to compare with."""
    assert main(["demo", *args[3:], "--trainer.max_steps", "1"]) == 0
    assert "GateRA in a few minutes" in capsys.readouterr().out


def test_demo_reports_problems_like_fit(args, capsys):
    assert main(["demo", *args[3:], "--model.adapter.rank", "0"]) == 2
    assert "model.adapter.rank: 0 is not a rank" in capsys.readouterr().err


# --- as a program ---


def test_python_m_help(elsewhere):
    shown = run_program("--help", cwd=elsewhere)
    assert "usage: python -m gatera_lightning" in shown
    assert all(verb in shown for verb in ("fit", "validate", "test", "predict"))


@pytest.mark.slow
def test_fit_beside_folders_of_the_same_names(args, elsewhere):
    for name in ("datamodules", "cli_configs"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text("raise RuntimeError('the folder of the user')\n")
    (elsewhere / "cli_configs" / "quickstart.yaml").write_text("nonsense: true\n")
    run_program(*args, cwd=elsewhere)
    assert (elsewhere / "runs/quickstart/version_0/checkpoints/last/adapter_model.safetensors").is_file()


def test_config_error_is_one_exception_with_all_problems():
    assert str(ConfigError("one")) == "one"
    assert str(ConfigError(["one", "two"])) == "  - one\n  - two"
