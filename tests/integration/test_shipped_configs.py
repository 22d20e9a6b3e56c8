"""Every shipped config runs, explains itself, and its command can be copied as it is."""

import json
import shlex
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml
from tiny_backbone import run_program, tiny_args
from transformers import Qwen3Config, Qwen3ForCausalLM

from gatera_lightning import AdapterConfig, BackboneConfig, inject_adapters, load_adapter
from gatera_lightning.adapters.targets import find_targets
from gatera_lightning.backbone.loading import load_backbone
from gatera_lightning.cli.main import main
from gatera_lightning.cli.shipped_configs import find_config
from gatera_lightning.datamodules.tasks.commonsense import TASKS

SHIPPED = Path(str(resources.files("gatera_lightning.cli_configs")))
ALL = sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*.yaml"))
RECIPES = [name for name in ALL if "/" not in name]
OVERLAYS = [name for name in ALL if name.startswith("overlays/")]
ELSEWHERE = ("overlays/hardware/fsdp.yaml",)  # needs two ranks: a test of its own
HEADINGS = ("Purpose", "Hardware", "Command", "Expect")

ONE_RANK = [
    *("--trainer.devices", "1", "--trainer.strategy", "auto", "--data.init_args.data_dir", "samples"),
    *("--data.init_args.num_workers", "0"),
]


def sample(task):
    """Flags that select the embedded examples of another task."""
    counts = {"train": 48, "validation": 16, "test": 6}
    return [
        arg
        for split, count in counts.items()
        for arg in (f"--data.init_args.{split}", f'["{task}[:{count}]"]')
    ]


FLAGS = {  # what makes a recipe for other machines run here
    "llama_commonsense.yaml": ONE_RANK,
    "smollm2_commonsense.yaml": ["--data.init_args.data_dir", "samples", "--trainer.val_check_interval", "3"],
    "llama_math.yaml": [*ONE_RANK, *sample("arithmetic")],
    "smollm2_math.yaml": [
        "--data.init_args.data_dir",
        "samples",
        "--trainer.val_check_interval",
        "3",
        *sample("arithmetic"),
    ],
    "smollm2_draft.yaml": [
        *("--data.init_args.data_dir", "samples", "--trainer.val_check_interval", "3"),
        *sample("arithmetic"),
    ],
    "llama_draft.yaml": [*ONE_RANK, "--data.init_args.template", "plain", *sample("arithmetic")],
    "llama_dialogue.yaml": [*ONE_RANK, *sample("smalltalk")],
    "smollm2_dialogue.yaml": ["--trainer.val_check_interval", "3", *sample("smalltalk")],
    "own_data.yaml": [
        "--data.init_args.template",
        "plain",
        *sample("calendar"),
    ],  # the tiny tokenizer has no chat template
}

ABLATIONS = {  # and the settings that each one changes
    "static_gate.yaml": {"model.adapter.gate.kind": "static", "model.adapter.gate.entropy_weight": 0.0},
    "no_entropy.yaml": {"model.adapter.gate.entropy_weight": 0.0},
    "fc_only.yaml": {"model.adapter.target_modules": ["up_proj", "down_proj"]},
    "qkv_only.yaml": {"model.adapter.target_modules": ["q_proj", "k_proj", "v_proj"]},
    "rank_8.yaml": {"model.adapter.rank": 8},
    "rank_16.yaml": {"model.adapter.rank": 16},
    "rank_64.yaml": {"model.adapter.rank": 64},
}


def header(name):
    """The header of a config as ``{heading: lines}``."""
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
    """The commands in a header, without ``python -m gatera_lightning``."""
    lines = "\n".join(header(name)["Command"]).replace("\\\n", " ").splitlines()
    start = "python -m gatera_lightning "
    return [shlex.split(line.removeprefix(start), comments=True) for line in lines if line.startswith(start)]


def fit(tmp_path, monkeypatch, *args):
    """Run ``fit`` in an empty folder and return the last checkpoint of its only run."""
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *args]) == 0
    (last,) = tmp_path.glob("runs/*/version_0/checkpoints/last.ckpt")
    return torch.load(last, weights_only=True)


def printed_config(capsys, configs, *flags):
    """Combine configs and return what ``fit --print_config`` prints, as nested dictionaries."""
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


def test_recipes_and_overlays_are_complete():
    assert set(ALL) == {*RECIPES, *OVERLAYS}
    assert {"quickstart.yaml", *FLAGS} <= set(RECIPES)
    assert {f"overlays/ablation/{name}" for name in ABLATIONS} <= set(OVERLAYS)
    assert len({Path(name).name for name in ALL}) == len(ALL)  # a short name means one file


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(name, tiny_backbone, tmp_path, monkeypatch):
    checkpoint = fit(tmp_path, monkeypatch, "--config", name, *tiny_args(tiny_backbone), *FLAGS.get(name, []))
    assert checkpoint["global_step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OVERLAYS if name not in ELSEWHERE])
def test_overlay_runs_on_quickstart(name, tiny_backbone, tmp_path, monkeypatch):
    checkpoint = fit(
        tmp_path, monkeypatch, "--config", "quickstart.yaml", "--config", name, *tiny_args(tiny_backbone)
    )
    assert checkpoint["global_step"] == 3
    adapter = checkpoint["adapter"]
    for key, value in (
        yaml.safe_load((SHIPPED / name).read_text()).get("model", {}).get("adapter", {}).items()
    ):
        if key == "gate":
            settings = {"kind": value} if isinstance(value, str) else value
            assert settings.items() <= adapter["gate"].items()
        else:
            assert adapter[key] == (4 if key == "rank" else value)  # the tiny layers are too small for 64
    has_gates = any(".gate." in key for key in checkpoint["state_dict"])
    assert has_gates == (adapter["gate"]["kind"] not in ("none", "position"))  # these have no parameters


@pytest.mark.slow
def test_fsdp_overlay_runs_on_two_ranks(tiny_backbone, tmp_path):
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
def test_header_has_every_heading_in_one_line(name):
    found = header(name)
    assert tuple(found) == HEADINGS
    assert all(len(lines) == 1 and lines[0] for lines in found.values())
    assert commands(name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_recipe_has_comment(name):
    """Sections and plain names need none; every value that a user might change has one."""
    plain = (
        "class_path",
        "name",
        "devices",
        "accelerator",
        "max_epochs",
        "log_every_n_steps",
        "weight_decay",
    )
    silent = []
    lines = (SHIPPED / name).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        key, colon, value = line.partition(":")
        is_setting = colon and value.strip() and not key.lstrip().startswith(("#", "-"))
        explained = "#" in value or lines[number - 1].lstrip().startswith("#")
        if is_setting and not explained and key.strip() not in (*plain, "train", "test", "validation", "id"):
            silent.append(line.strip())
    assert silent == []


def write_adapter(folder, **adapter):
    """Write the part of an adapter folder that a configuration is checked against."""
    folder.mkdir(parents=True)
    backbone = {"id": None, "revision": None, "fingerprint": ""}
    description = {"format_version": 2, "adapter": AdapterConfig(**adapter).to_dict(), "backbone": backbone}
    (folder / "adapter_config.json").write_text(json.dumps(description))


@pytest.mark.parametrize("name", ALL)
def test_header_commands_parse(name, tiny_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
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
def test_recipe_states_what_is_supervised(name):
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
def test_overlay_changes_neither_data_nor_backbone(name):
    """Except that a backbone overlay names a backbone, cpu.yaml sets the dtype, nf4.yaml packs weights."""
    settings = yaml.safe_load((SHIPPED / name).read_text())
    of_hardware = {"cpu.yaml": {"dtype"}, "nf4.yaml": {"quantization"}}
    allowed = {"id"} if "/backbone/" in name else of_hardware.get(name.rpartition("/")[2], set())
    assert "data" not in settings
    assert set(settings.get("model", {}).get("backbone", {})) <= allowed


def test_hira_overlay_removes_alpha(tiny_backbone, tmp_path, monkeypatch, capsys):
    """HiRA has no scale, so it must not inherit LoRA's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("model: {adapter: {update: lora, alpha: 8}}\n")
    configs = ["quickstart.yaml", "mine.yaml", "hira.yaml"]
    adapter = printed_config(capsys, configs, "--model.backbone.id", str(tiny_backbone))["model"]["adapter"]
    assert (adapter["update"], adapter["gate"]["kind"], adapter["alpha"]) == ("hira", "none", None)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_only_its_own_settings(name, tiny_backbone, capsys):
    recipe, backbone = "llama_commonsense.yaml", ["--model.backbone.id", str(tiny_backbone)]
    plain = flat(printed_config(capsys, [recipe], *backbone))
    ablated = flat(printed_config(capsys, [recipe, name], *backbone))
    assert {key: value for key, value in ablated.items() if value != plain[key]} == ABLATIONS[name]
    of_token_gates = ("skip_below", "merge_above", "gradient_share")
    assert set(plain) - set(ablated) <= {f"model.adapter.gate.{key}" for key in of_token_gates}


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("fc_only.yaml", ["mlp.up_proj", "mlp.down_proj"]),
        ("qkv_only.yaml", [f"self_attn.{p}_proj" for p in "qkv"]),
    ],
)
def test_placement_overlay_adapts_its_projections(name, adapted, tiny_backbone, capsys):
    flags = ["--model.backbone.id", str(tiny_backbone), "--model.adapter.rank", "4"]
    printed = printed_config(capsys, ["llama_commonsense.yaml", name], *flags)
    adapter = AdapterConfig.from_dict(printed["model"]["adapter"])
    report = inject_adapters(load_backbone(BackboneConfig(id=str(tiny_backbone), dtype="float32")), adapter)
    assert list(report.layers) == [
        f"model.layers.{layer}.{projection}" for layer in (0, 1) for projection in adapted
    ]


@pytest.mark.parametrize(
    ("old", "overlay"),
    [("llama2_commonsense.yaml", "llama2_7b.yaml"), ("qwen_commonsense.yaml", "qwen3_8b.yaml")],
)
def test_renamed_recipe_is_recipe_with_backbone_overlay(old, overlay, capsys):
    recipe = flat(printed_config(capsys, ["llama_commonsense.yaml"]))
    combined = flat(printed_config(capsys, ["llama_commonsense.yaml", overlay]))
    assert flat(printed_config(capsys, [old])) == combined
    differing = {key: value for key, value in combined.items() if value != recipe[key]}
    assert set(differing) == {"model.backbone.id", "trainer.logger.init_args.name"}
    assert differing["trainer.logger.init_args.name"] == Path(old).stem


def test_qwen_has_the_projections_of_the_recipe():
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, num_hidden_layers=1))
    settings = yaml.safe_load((SHIPPED / "llama_commonsense.yaml").read_text())["model"]["adapter"]
    _, matches = find_targets(model, AdapterConfig(**{**settings, "gate": "token"}))
    assert matches == dict.fromkeys(("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 1)


def test_find_config_finds_every_shipped_file():
    for name in ALL:
        assert Path(find_config(name)).samefile(SHIPPED / name)
        assert Path(find_config(Path(name).name)).samefile(SHIPPED / name)
