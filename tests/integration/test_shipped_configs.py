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
from transformers import Qwen3Config, Qwen3ForCausalLM

from gatera_lightning import AdapterConfig, BackboneConfig, inject_adapters, load_adapter
from gatera_lightning.adapters.injection import find_targets
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.lightning_cli import find_config
from gatera_lightning.cli.main import main
from gatera_lightning.datamodules.tasks.commonsense import TASKS

SHIPPED = Path(str(resources.files("gatera_lightning.cli_configs")))
ALL = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
RECIPES = [name for name in ALL if "/" not in name]
OVERLAYS = [name for name in ALL if name.startswith("overlays/")]
HEADINGS = ("Purpose", "Hardware", "Command", "Expect")

ONE_PROCESS = [
    *("--trainer.devices", "1", "--trainer.strategy", "auto", "--data.init_args.data_dir", "samples"),
    *("--data.init_args.num_workers", "0"),
]


def sample(task):
    """Flags for the embedded rows of a family that is not commonsense."""
    rows = {"train": 48, "validation": 16, "test": 6}
    return [
        arg for split, count in rows.items() for arg in (f"--data.init_args.{split}", f'["{task}[:{count}]"]')
    ]


HERE = {  # what a recipe for other machines needs to run here
    "llama_commonsense.yaml": ONE_PROCESS,
    "llama2_commonsense.yaml": ONE_PROCESS,
    "qwen_commonsense.yaml": ONE_PROCESS,
    "smollm2_commonsense.yaml": ["--data.init_args.data_dir", "samples", "--trainer.val_check_interval", "3"],
    "llama_math.yaml": [*ONE_PROCESS, *sample("arithmetic")],
    "smollm2_math.yaml": [
        "--data.init_args.data_dir",
        "samples",
        "--trainer.val_check_interval",
        "3",
        *sample("arithmetic"),
    ],
    "llama_dialogue.yaml": [*ONE_PROCESS, *sample("smalltalk")],
    "smollm2_dialogue.yaml": ["--trainer.val_check_interval", "3", *sample("smalltalk")],
    "own_data.yaml": [
        "--data.init_args.template",
        "plain",
        *sample("calendar"),
    ],  # the tiny tokenizer has no chat template
}

ABLATIONS = {  # and the settings that each one is about
    "static_gate.yaml": {"model.adapter.gate": "static", "model.gate_entropy_weight": 0.0},
    "no_entropy.yaml": {"model.gate_entropy_weight": 0.0},
    "fc_only.yaml": {"model.adapter.target_modules": ["up_proj", "down_proj"]},
    "qkv_only.yaml": {"model.adapter.target_modules": ["q_proj", "k_proj", "v_proj"]},
    "rank_8.yaml": {"model.adapter.rank": 8},
    "rank_16.yaml": {"model.adapter.rank": 16},
    "rank_64.yaml": {"model.adapter.rank": 64},
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
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(start)]


def fit(tmp_path, monkeypatch, *args):
    """Run ``fit`` in an empty folder; the last checkpoint of its only run."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *args]) == 0
    (last,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    return torch.load(last, weights_only=True)


def printed_config(capsys, configs, *flags):
    """What ``fit --print_config`` says of configs laid over one another, as nested dictionaries."""
    with pytest.raises(SystemExit) as caught:
        main(["fit", *(arg for name in configs for arg in ("--config", name)), *flags, "--print_config"])
    assert caught.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def flat(settings, prefix=""):
    """``{"model": {"adapter": {"rank": 8}}}`` -> ``{"model.adapter.rank": 8}``."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_there_are_recipes_and_overlays():
    assert set(ALL) == {*RECIPES, *OVERLAYS}
    assert {"quickstart.yaml", *HERE} <= set(RECIPES)
    assert {f"overlays/{name}" for name in ABLATIONS} <= set(OVERLAYS)
    assert len({Path(name).name for name in ALL}) == len(ALL)  # a bare name means one file


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(name, tiny_backbone, tmp_path, monkeypatch):
    checkpoint = fit(tmp_path, monkeypatch, "--config", name, *tiny_args(tiny_backbone), *HERE.get(name, []))
    assert checkpoint["global_step"] == 3


@pytest.mark.parametrize("name", [name for name in OVERLAYS if name != "overlays/fsdp.yaml"])
def test_overlay_runs_over_the_quickstart(name, tiny_backbone, tmp_path, monkeypatch):
    checkpoint = fit(
        tmp_path, monkeypatch, "--config", "quickstart.yaml", "--config", name, *tiny_args(tiny_backbone)
    )
    assert checkpoint["global_step"] == 3
    adapter, wanted = checkpoint["hyper_parameters"]["adapter"], yaml.safe_load((SHIPPED / name).read_text())
    for key, value in wanted.get("model", {}).get("adapter", {}).items():
        assert adapter[key] == (4 if key == "rank" else value)  # the tiny layers have no room for 64
    gates = [key for key in checkpoint["state_dict"] if ".gate." in key]
    assert bool(gates) == (adapter["gate"] != "none")


@pytest.mark.slow
def test_fsdp_overlay_runs_in_two_processes(tiny_backbone, tmp_path):
    configs = [
        "--config",
        "quickstart.yaml",
        "--config",
        "fsdp.yaml",
        *tiny_args(tiny_backbone),
        "--trainer.devices",
        "2",
    ]
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


def write_adapter(folder, **adapter):
    """An adapter folder, as far as a configuration is checked against it."""
    folder.mkdir(parents=True)
    backbone = {"id": None, "revision": None, "fingerprint": ""}
    description = {"format_version": 1, "adapter": asdict(AdapterConfig(**adapter)), "backbone": backbone}
    (folder / "adapter_config.json").write_text(json.dumps(description))


@pytest.mark.parametrize("name", ALL)
def test_commands_of_the_header_parse(name, tiny_backbone, tmp_path, monkeypatch, capsys):
    """From a folder that holds what the header says one has."""
    monkeypatch.chdir(tmp_path)
    adapter = yaml.safe_load((SHIPPED / name).read_text()).get("model", {}).get("adapter", {})
    write_adapter(tmp_path / "RUN" / "checkpoints" / "last", **adapter)
    monkeypatch.setenv("GATERA_DATA", str(tmp_path))
    for task in (*(f"commonsense/{task}" for task in TASKS), "math/gsm8k"):
        (tmp_path / task).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / task / f"{split}.json{'l' if task == 'math/gsm8k' else ''}").write_text("[]")
    dialogues = tmp_path / "dialogue" / "convai2"
    dialogues.mkdir(parents=True)
    (dialogues / "valid_self_original.shared.txt").touch()
    for command in commands(name):
        assert name in command or Path(name).name in command
        with pytest.raises(SystemExit) as caught:
            main([*command, "--model.backbone.id", str(tiny_backbone), "--print_config"])
        assert caught.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        for section, settings in yaml.safe_load((SHIPPED / name).read_text()).items():
            if section == "trainer":
                assert {
                    key: printed["trainer"][key] for key in settings if not isinstance(settings[key], dict)
                } == {key: value for key, value in settings.items() if not isinstance(value, dict)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_say_what_the_loss_is_computed_on(name):
    data = yaml.safe_load((SHIPPED / name).read_text())["data"]
    own = {
        "CommonsenseDataModule": {"answer_format"},
        "MathDataModule": {"answer_style"},
        "DialogueDataModule": {"split_by"},
    }
    assert {"train_on", "template", *own.get(data["class_path"].rpartition(".")[2], ())} <= set(
        data["init_args"]
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_only_what_it_is_about(name):
    """An overlay that named data or backbone would take them from the config it is laid over; cpu.yaml chooses a dtype."""
    settings = yaml.safe_load((SHIPPED / name).read_text())
    assert "data" not in settings
    assert set(settings.get("model", {}).get("backbone", {})) <= (
        {"dtype"} if name == "overlays/cpu.yaml" else set()
    )


def test_method_overlays_differ_in_nothing_but_the_method(tiny_backbone, tmp_path, monkeypatch, capsys):
    """Over a recipe with LoRA's alpha, hira.yaml must not inherit a scale that HiRA does not have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {adapter: {update: lora, alpha: 8}}\n")
    configs = ["quickstart.yaml", "mine.yaml", "hira.yaml"]
    adapter = printed_config(capsys, configs, "--model.backbone.id", str(tiny_backbone))["model"]["adapter"]
    assert (adapter["update"], adapter["gate"], adapter["alpha"]) == ("hira", "none", None)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_its_own_settings_and_nothing_else(name, tiny_backbone, capsys):
    recipe, backbone = "llama_commonsense.yaml", ["--model.backbone.id", str(tiny_backbone)]
    plain = flat(printed_config(capsys, [recipe], *backbone))
    ablated = flat(printed_config(capsys, [recipe, name], *backbone))
    assert plain.keys() == ablated.keys()
    assert {key: value for key, value in ablated.items() if value != plain[key]} == ABLATIONS[name]


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("fc_only.yaml", ["mlp.up_proj", "mlp.down_proj"]),
        ("qkv_only.yaml", [f"self_attn.{p}_proj" for p in "qkv"]),
    ],
)
def test_placement_overlays_adapt_the_projections_they_name(name, adapted, tiny_backbone, capsys):
    flags = ["--model.backbone.id", str(tiny_backbone), "--model.adapter.rank", "4"]
    adapter = AdapterConfig(
        **printed_config(capsys, ["llama_commonsense.yaml", name], *flags)["model"]["adapter"]
    )
    report = inject_adapters(load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32")), adapter)
    assert list(report.layers) == [
        f"model.layers.{layer}.{projection}" for layer in (0, 1) for projection in adapted
    ]


@pytest.mark.parametrize("name", ["llama2_commonsense.yaml", "qwen_commonsense.yaml"])
def test_the_recipe_is_one_for_every_backbone(name):
    """Only the backbone and the name of the run's folder differ."""
    paper, other = (
        flat(yaml.safe_load((SHIPPED / file).read_text())) for file in ("llama_commonsense.yaml", name)
    )
    assert paper.keys() == other.keys()
    differing = {key for key, value in other.items() if value != paper[key]}
    assert differing == {"model.backbone.id", "trainer.logger.init_args.name"}
    assert other["trainer.logger.init_args.name"] == Path(name).stem


def test_qwen_names_its_projections_as_llama_does():
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, num_hidden_layers=1))
    settings = yaml.safe_load((SHIPPED / "qwen_commonsense.yaml").read_text())["model"]["adapter"]
    _, matches = find_targets(model, AdapterConfig(**settings))
    assert matches == dict.fromkeys(("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 1)


def test_find_config_serves_every_shipped_file():
    for name in ALL:
        assert Path(find_config(name)).samefile(SHIPPED / name)
        assert Path(find_config(Path(name).name)).samefile(SHIPPED / name)
