"""``fit``, ``validate``, ``test`` and ``predict``: how settings combine, and what runs leave behind."""

import contextlib
import io
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_backbone import run_program, tiny_args

from gatera_lightning import ConfigError, GateRAModule
from gatera_lightning.adapters.peft_schema import from_peft_tensor
from gatera_lightning.cli.main import main

# --- settings ---


def test_later_configs_win_and_flags_win_over_all(working_folder, print_config, tiny_backbone):
    (working_folder / "mine.yaml").write_text(
        "model: {adapter: {rank: 8, dropout: 0.1}, optimizer: {lr: 0.5}, "
        f"backbone: {{id: {tiny_backbone}}}}}\n"
    )
    configs = ["-c", "quickstart.yaml", "--config=lora.yaml", "--config", "mine.yaml"]
    model = print_config("fit", *configs, "--model.adapter.dropout", "0.2")["model"]
    assert model["adapter"]["update"] == "lora"  # lora.yaml over quickstart.yaml
    assert model["adapter"]["gate"]["kind"] == "none"  # lora.yaml over quickstart.yaml
    assert model["adapter"]["rank"] == 8  # mine.yaml over quickstart.yaml
    assert model["adapter"]["dropout"] == 0.2  # flag over mine.yaml
    assert model["optimizer"]["lr"] == 0.5  # mine.yaml over lora.yaml
    assert model["optimizer"]["warmup_steps"] == 10  # quickstart.yaml over the default of 100
    assert model["optimizer"]["weight_decay"] == 0.0  # the default
    assert model["backbone"]["id"] == str(tiny_backbone)
    other_order = ["-c", "quickstart.yaml", "-c", "mine.yaml", "-c", "lora.yaml"]
    assert print_config("fit", *other_order)["model"]["optimizer"]["lr"] == 2e-3


def test_flag_before_a_config_wins(print_config, tiny_backbone):
    flags = ["--model.adapter.rank", "3", "--model.backbone.id", str(tiny_backbone)]
    model = print_config("fit", *flags, "--config", "quickstart.yaml")["model"]
    assert (model["adapter"]["rank"], model["backbone"]["id"]) == (3, str(tiny_backbone))


@pytest.mark.parametrize("gate", ["none", "static", "token"])
def test_printed_config_loads_again(fit, print_config, working_folder, gate):
    printed = print_config(*fit, "--model.adapter.gate", gate)
    assert printed["model"]["adapter"]["gate"]["kind"] == gate
    (working_folder / "printed.yaml").write_text(yaml.safe_dump(printed))
    assert print_config("fit", "--config", "printed.yaml") == printed


def test_limit_on_a_task_is_kept_as_text(fit, print_config):
    data = print_config(*fit, "--data.init_args.train", '["everyday[:48]"]')["data"]
    assert data["init_args"]["train"] == ["everyday[:48]"]


def test_help_explains_every_setting(help_text):
    text = help_text("fit")
    for phrase in (
        "Rank r of B A; at most the smaller side of every adapted weight.",
        "Hub id, local folder, .gguf file, or package:NAME",
        "hira = (W0 ⊙ B A) x",
        "token = σ(w·x + b)",
        "--model.optimizer.lr",
        "--gate_histogram.every_n_steps",
        "--throughput.every_n_steps",
    ):
        assert phrase in text
    for section in (
        "--model.optimizer.lr LR",
        "--checkpoint.monitor MONITOR",
        "--throughput.every_n_steps EVERY_N_STEPS",
    ):
        assert re.search(re.escape(section) + r" [A-Z]\w+ ", text), section  # a sentence follows


# --- runs ---


@pytest.fixture(scope="module")
def runs(tiny_backbone, tmp_path_factory):
    """The folder of two runs of ``fit``, and the files of the first as they were before the second."""
    root = tmp_path_factory.mktemp("runs")
    flags = [*tiny_args(tiny_backbone), "--gate_histogram.every_n_steps", "1"]
    args = ["fit", "--config", "quickstart.yaml", *flags]
    with contextlib.chdir(root):
        assert main(args) == 0
        first = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert main(args) == 0
    return root / "runs" / "quickstart", first


@pytest.fixture
def checkpoints(runs):
    """The folder of the first run's checkpoints."""
    return runs[0] / "version_0" / "checkpoints"


def test_second_run_overwrites_nothing(runs):
    root, first = runs
    assert sorted(path.name for path in root.iterdir()) == ["version_0", "version_1"]
    assert {path: path.read_bytes() for path in first} == first
    versions = [root / f"version_{i}" for i in (0, 1)]
    names = [{str(path.relative_to(v)).partition("tfevents")[0] for path in v.rglob("*")} for v in versions]
    assert names[0] == names[1]
    assert {"config.yaml", "checkpoints/last.ckpt", "checkpoints/last/adapter_model.safetensors"} <= names[0]


def test_same_seed_gives_same_adapter(runs):
    root, _ = runs
    paths = [root / f"version_{i}" / "checkpoints" / "last" / "adapter_model.safetensors" for i in (0, 1)]
    first, second = map(load_file, paths)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_config_repeats_the_run(runs, print_config):
    config = runs[0] / "version_0" / "config.yaml"
    assert print_config("fit", "--config", str(config)) == yaml.safe_load(config.read_text())


def test_module_loads_from_checkpoint(checkpoints, tiny_backbone):
    module = GateRAModule.load_from_checkpoint(checkpoints / "last.ckpt", map_location="cpu")
    assert (module.adapter.rank, module.adapter.gate.kind) == (4, "token")
    assert module.backbone.id == str(tiny_backbone)
    parameters = dict(module.model.named_parameters())
    saved = load_file(checkpoints / "last" / "adapter_model.safetensors")
    assert all(torch.equal(parameters[from_peft_tensor(name)], saved[name]) for name in saved)


def test_test_evaluates_trained_adapter(recipe, checkpoints, capsys):
    adapter = checkpoints / "last"
    assert main(["test", *recipe, "--model.warm_start", str(adapter)]) == 0
    trained = json.loads(Path("runs/quickstart/version_0/test_results.json").read_text())
    assert trained["tasks"]["everyday"]["sum"]["n"] == 6
    out = capsys.readouterr().out
    assert "accuracy [95 % interval]" in out
    assert f"{trained['nats_per_target_token']:.4f} nats per token" in out
    assert "test/accuracy_sum" not in out  # Lightning's own table would repeat the results
    assert main(["test", *recipe]) == 0
    untrained = json.loads(Path("runs/quickstart/version_1/test_results.json").read_text())
    assert trained["nats_per_target_token"] < untrained["nats_per_target_token"]
    assert main(["test", *recipe, "--ckpt_path", f"{adapter}.ckpt"]) == 0
    from_checkpoint = json.loads(Path("runs/quickstart/version_2/test_results.json").read_text())
    for key in ("tasks", "average", "identity"):
        assert from_checkpoint[key] == trained[key]


def test_predict_and_validate_evaluate_trained_adapter(recipe, checkpoints, capsys):
    adapter = ["--model.warm_start", str(checkpoints / "last")]
    assert main(["predict", *recipe, *adapter]) == 0
    path = Path("runs/quickstart/version_0/predictions.jsonl")
    assert f"6 predictions: {path}" in capsys.readouterr().out
    assert [json.loads(line)["example"] for line in path.read_text().splitlines()] == list(range(6))
    assert main(["validate", *recipe, *adapter]) == 0
    assert "val/loss" in capsys.readouterr().out


def test_adapter_of_another_rank_is_rejected(recipe, checkpoints, problems):
    flags = ["--model.warm_start", str(checkpoints / "last"), "--model.adapter.rank", "2"]
    assert any(
        "has rank 4, but model.adapter.rank is 2" in line for line in problems("test", *recipe, *flags)
    )


@pytest.mark.parametrize("path", ["last.ckpt", ""], ids=["file", "folder"])
def test_resumed_run_continues_the_step_count(fit, checkpoints, path):
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3
    more = ["--trainer.max_steps", "5", "--trainer.max_epochs", "5", "--ckpt_path", str(checkpoints / path)]
    assert main([*fit, *more]) == 0
    resumed = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 5
    assert all(int(state["step"]) == 5 for state in resumed["optimizer_states"][0]["state"].values())
    assert resumed["lr_schedulers"][0]["last_epoch"] == 5


def test_folder_of_a_run_as_checkpoint_names_the_folder_inside(recipe, checkpoints, problems):
    run = checkpoints.parent
    named = f"did you mean '{run / 'checkpoints'}'?"
    assert any(named in line for line in problems("test", *recipe, "--ckpt_path", str(run)))


def test_last_needs_a_checkpoint_except_for_fit(fit, recipe, caplog, capsys):
    assert main(["test", *recipe, "--ckpt_path", "last"]) == 2
    assert "ckpt_path: 'last', and " in capsys.readouterr().err
    with caplog.at_level("INFO"):
        assert main([*fit, "--ckpt_path", "last"]) == 0
    assert "the run starts from the beginning" in caplog.text


def test_non_finite_loss_stops_the_run(fit, capsys):
    """The step at lr 1e30 is taken, and the next loss is nan; the checkpoint between them stays."""
    flags = ["--model.optimizer.lr", "1e30", "--model.optimizer.warmup_steps", "0"]
    flags += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "2"]
    assert main([*fit, *flags]) == 1
    error = capsys.readouterr().err
    assert "the loss of optimizer step 2 is nan" in error
    assert "(1e+30)" in error
    assert "Traceback" not in error
    ids = {int(i) for i in re.search(r"\[([\d, ]+)\]", error)[1].split(", ")}
    assert 8 <= len(ids) <= 16  # of at least one micro-batch
    assert ids <= set(range(48))
    checkpoint = torch.load("runs/quickstart/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


def test_debug_overlay_limits_every_subcommand(recipe):
    debug = [*recipe, "--config", "debug.yaml", "--data.init_args.eval_batch_size", "7"]
    assert main(["test", *debug]) == 0
    assert main(["predict", *debug]) == 0


@pytest.mark.slow
def test_users_folders_do_not_shadow_the_package(fit, working_folder):
    for name in ("datamodules", "cli_configs"):
        (working_folder / name).mkdir()
        (working_folder / name / "__init__.py").write_text("raise RuntimeError('the folder of the user')\n")
    (working_folder / "cli_configs" / "quickstart.yaml").write_text("nonsense: true\n")
    run_program(*fit, cwd=working_folder)
    last = working_folder / "runs/quickstart/version_0/checkpoints/last"
    assert (last / "adapter_model.safetensors").is_file()


# --- checkpoints do not change settings ---


@pytest.fixture
def settings_in_runs(monkeypatch):
    """The settings of every module whose weights were about to be loaded."""
    found = []

    def stop(self):
        found.append(self)
        raise ConfigError("weights would be loaded now")

    monkeypatch.setattr(GateRAModule, "configure_model", stop)
    return found


@pytest.mark.parametrize(
    ("subcommand", "path"),
    [*((name, "last.ckpt") for name in ("fit", "validate", "test", "predict")), ("fit", "")],
)
def test_checkpoint_does_not_replace_settings(recipe, checkpoints, settings_in_runs, subcommand, path):
    flags = ["--model.decoding.max_new_tokens", "3", "--model.optimizer.max_skipped_steps", "7"]
    assert main([subcommand, *recipe, *flags, "--ckpt_path", str(checkpoints / path)]) == 2
    (module,) = settings_in_runs
    assert module.decoding.max_new_tokens == 3
    assert module.optimizer.max_skipped_steps == 7


@pytest.mark.parametrize(
    "foreign",
    [
        {"backbone": {"id": "nobody/model", "trust_remote_code": True}},
        {"warm_start": "elsewhere"},
        {"adapter": {"rank": 64}, "decoding": {"beams": 5}},
        {"_class_path": "os.system", "command": "true"},
        {"_instantiator": "os.system"},
    ],
    ids=["trust", "warm start", "sections", "class", "instantiator"],
)
def test_settings_in_a_checkpoint_file_are_ignored(
    recipe, checkpoints, settings_in_runs, tiny_backbone, foreign
):
    contents = torch.load(checkpoints / "last.ckpt", weights_only=True)
    contents["hyper_parameters"] |= foreign
    torch.save(contents, "foreign.ckpt")
    main(["validate", *recipe, "--ckpt_path", "foreign.ckpt"])
    (module,) = settings_in_runs
    assert module.backbone.id == str(tiny_backbone)
    assert module.backbone.trust_remote_code is False
    assert (module.warm_start, module.adapter.rank, module.decoding.beams) == (None, 4, 1)


# --- unusable checkpoint files ---


def truncated(path, content):
    path.write_bytes(content[: len(content) // 2])


def state_dict_only(path, content):
    torch.save(torch.load(io.BytesIO(content), weights_only=True)["state_dict"], path)


def pickled_object(path, content):
    torch.save({"state_dict": {}, "model": Marker()}, path)


def without_optimizer(path, content):
    contents = torch.load(io.BytesIO(content), weights_only=True)
    del contents["optimizer_states"]
    torch.save(contents, path)


class Marker:
    """Leaves a file where it is unpickled."""

    def __reduce__(self):
        return (Path("unpickled").touch, ())


UNUSABLE = {
    "truncated": (truncated, "the file is corrupt"),
    "empty": (lambda path, _: path.write_bytes(b""), "the file is empty"),
    "text": (lambda path, _: path.write_text("not a checkpoint\n"), "the file is corrupt"),
    "pickle": (lambda path, _: path.write_bytes(pickle.dumps(Marker())), "the file is corrupt"),
    "legacy": (
        lambda path, _: torch.save({"a": Marker()}, path, _use_new_zipfile_serialization=False),
        "the file is corrupt",
    ),
    "pickled object": (pickled_object, "classes that are not allowed"),
    "state dict": (state_dict_only, "not a checkpoint of an adapter; it lacks"),
    "list": (lambda path, _: torch.save([1, 2], path), "it holds a list, not a checkpoint"),
    "tensor": (lambda path, _: torch.save(torch.ones(2), path), "it holds a Tensor, not a checkpoint"),
    "folder": (lambda path, _: path.mkdir(), "the checkpoint is corrupt (files.json"),
}


@pytest.mark.parametrize(
    ("subcommand", "kind"),
    [("fit", kind) for kind in UNUSABLE]
    + [(name, "truncated") for name in ("validate", "test", "predict", "export")]
    + [("export", kind) for kind in ("pickled object", "empty", "folder")],
)
def test_unusable_checkpoint_is_one_sentence(recipe, checkpoints, no_weights, capsys, kind, subcommand):
    make, message = UNUSABLE[kind]
    make(Path("bad.ckpt"), (checkpoints / "last.ckpt").read_bytes())
    args = ["bad.ckpt", "--out", "out"] if subcommand == "export" else [*recipe, "--ckpt_path", "bad.ckpt"]
    assert main([subcommand, *args]) in (1, 2)
    error = capsys.readouterr().err
    assert "bad.ckpt" in error
    assert "Traceback" not in error
    assert message in error
    assert not Path("unpickled").exists()


def test_resuming_needs_more_than_the_adapter(fit, recipe, checkpoints, no_weights, capsys):
    without_optimizer(Path("weights.ckpt"), (checkpoints / "last.ckpt").read_bytes())
    assert main([*fit, "--ckpt_path", "weights.ckpt"]) == 1
    assert "weights.ckpt: this checkpoint cannot resume a run; it lacks optimizer_states" in (
        capsys.readouterr().err
    )
