"""Every shipped YAML runs, says what it is for, and its command can be typed as it stands."""

import json
import shlex
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from tiny_backbone import run_program, tiny_args

from gatera_lightning import AdapterConfig, BackboneConfig, load_adapter
from gatera_lightning.__main__ import main
from gatera_lightning.backbone import load_backbone
from gatera_lightning.cli import find_config
from gatera_lightning.datamodules.commonsense import TASKS

SHIPPED = Path(str(resources.files("gatera_lightning.cli_configs")))
ALL = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
RECIPES = [name for name in ALL if "/" not in name]
OVERLAYS = [name for name in ALL if name.startswith("overlays/")]
HEADINGS = ("Purpose", "Hardware", "Command", "Expect")

HERE = {  # what a recipe for other machines needs to run here
    "llama_commonsense.yaml": [
        *("--trainer.devices", "1", "--trainer.strategy", "auto", "--data.init_args.data_dir", "samples"),
        *("--data.init_args.num_workers", "0"),
    ],
}


def header(name):
    """``{heading: lines}`` of the comment that a config begins with."""
    found, heading = {}, None
    for line in (SHIPPED / name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#")
        title, colon, rest = text.strip().partition(":")
        if colon and title in HEADINGS and text.startswith(f" {title}"):
            heading, text = title, rest
        found.setdefault(heading, []).append(text.strip())
    return found


def commands(name):
    """The command lines in a header, continued lines joined, without ``python -m gatera_lightning``."""
    lines = "\n".join(header(name)["Command"]).replace("\\\n", " ").splitlines()
    start = "python -m gatera_lightning "
    return [shlex.split(line.removeprefix(start)) for line in lines if line.startswith(start)]


def fit(tmp_path, monkeypatch, *args):
    """Run ``fit`` in an empty folder; the last checkpoint of its only run."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *args]) == 0
    (last,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    return torch.load(last, weights_only=True)


def test_there_are_recipes_and_overlays():
    assert set(ALL) == {*RECIPES, *OVERLAYS}
    assert {"quickstart.yaml", "llama_commonsense.yaml"} <= set(RECIPES)
    assert len({Path(name).name for name in ALL}) == len(ALL)  # a bare name means one file


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(name, tiny_backbone, tmp_path, monkeypatch):
    checkpoint = fit(tmp_path, monkeypatch, "--config", name, *tiny_args(tiny_backbone), *HERE.get(name, []))
    assert checkpoint["global_step"] == 3


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "overlays/fsdp.yaml"])
def test_overlay_runs_over_the_quickstart(name, tiny_backbone, tmp_path, monkeypatch):
    checkpoint = fit(tmp_path, monkeypatch, "--config", "quickstart.yaml", "--config", name, *tiny_args(tiny_backbone))
    assert checkpoint["global_step"] == 3
    adapter, wanted = checkpoint["hyper_parameters"]["adapter"], yaml.safe_load((SHIPPED / name).read_text())
    for key, value in wanted.get("model", {}).get("adapter", {}).items():
        assert adapter[key] == value
    gates = [key for key in checkpoint["state_dict"] if ".gate." in key]
    assert bool(gates) == (adapter["gate"] != "none")


@pytest.mark.slow
def test_fsdp_overlay_runs_in_two_processes(tiny_backbone, tmp_path):
    configs = ["--config", "quickstart.yaml", "--config", "fsdp.yaml", *tiny_args(tiny_backbone), "--trainer.devices", "2"]
    run_program("fit", *configs, cwd=tmp_path)
    last = tmp_path / "runs" / "quickstart" / "version_0" / "checkpoints" / "last"
    assert torch.load(last.with_suffix(".ckpt"), weights_only=True)["global_step"] == 3
    model = load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32"))
    load_adapter(model, last)
    assert any(p.abs().sum() for name, p in model.named_parameters() if name.endswith("update.b"))


@pytest.mark.parametrize("name", ALL)
def test_header_says_what_one_needs_to_know(name):
    found = header(name)
    assert tuple(found) == HEADINGS
    assert all(lines[0] for lines in found.values())
    assert commands(name)


def write_adapter(folder):
    """An adapter folder of the default method, as far as a configuration is checked against it."""
    folder.mkdir(parents=True)
    backbone = {"id": None, "revision": None, "fingerprint": ""}
    description = {"format_version": 1, "adapter": asdict(AdapterConfig()), "backbone": backbone}
    (folder / "adapter_config.json").write_text(json.dumps(description))


@pytest.mark.parametrize("name", ALL)
def test_commands_of_the_header_parse(name, tiny_backbone, tmp_path, monkeypatch, capsys):
    """From a folder that holds what the header says one has."""
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "RUN" / "checkpoints" / "last")
    for task in TASKS:
        (tmp_path / "LLM-Adapters" / "dataset" / task).mkdir(parents=True)
        (tmp_path / "LLM-Adapters" / "dataset" / task / "test.json").write_text("[]")
    for command in commands(name):
        assert name in command or Path(name).name in command
        with pytest.raises(SystemExit) as caught:
            main([*command, "--model.backbone.id", str(tiny_backbone), "--print_config"])
        assert caught.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        for section, settings in yaml.safe_load((SHIPPED / name).read_text()).items():
            if section == "trainer":
                assert {key: printed["trainer"][key] for key in settings if not isinstance(settings[key], dict)} == {
                    key: value for key, value in settings.items() if not isinstance(value, dict)
                }


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_the_loss_is_computed_on(name):
    settings = yaml.safe_load((SHIPPED / name).read_text())["data"]["init_args"]
    assert {"train_on", "answer_format", "template"} <= set(settings)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_only_what_it_is_about(name):
    """An overlay that named data or backbone would take them from the config it is laid over."""
    settings = yaml.safe_load((SHIPPED / name).read_text())
    assert "data" not in settings
    assert "backbone" not in settings.get("model", {})


def test_method_overlays_differ_in_nothing_but_the_method(tiny_backbone, tmp_path, monkeypatch, capsys):
    """Over a recipe with LoRA's alpha, hira.yaml must not inherit a scale that HiRA does not have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {adapter: {update: lora, alpha: 8}}\n")
    configs = ["fit", *(arg for name in ("quickstart.yaml", "mine.yaml", "hira.yaml") for arg in ("--config", name))]
    with pytest.raises(SystemExit) as caught:
        main([*configs, "--model.backbone.id", str(tiny_backbone), "--print_config"])
    assert caught.value.code == 0
    adapter = yaml.safe_load(capsys.readouterr().out)["model"]["adapter"]
    assert (adapter["update"], adapter["gate"], adapter["alpha"]) == ("hira", "none", None)


def test_find_config_serves_every_shipped_file():
    for name in ALL:
        assert Path(find_config(name)).samefile(SHIPPED / name)
        assert Path(find_config(Path(name).name)).samefile(SHIPPED / name)
