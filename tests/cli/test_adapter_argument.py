"""Every command that takes an adapter takes its folder, a run's folder, and an id on the hub."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from gate_reports import save_random_adapter
from transformers import AutoModelForCausalLM

from gatera_lightning import ConfigError
from gatera_lightning.cli.adapter_argument import ACCEPTED, adapter_folder
from gatera_lightning.cli.main import main

COMMANDS = {
    "chat": lambda adapter: ["chat", "--adapter", adapter],
    "generate": lambda adapter: ["generate", "--adapter", adapter, "--prompt", "Hello"],
    "gates": lambda adapter: ["gates", "--adapter", adapter, "--out", "gates.json"],
    "export": lambda adapter: ["export", adapter, "--out", "exported"],
    "serve": lambda adapter: ["serve", adapter],
    "harness": lambda adapter: ["harness", "--adapter", adapter, "--tasks", "gatera_everyday", "--out", "o"],
    "test": lambda adapter: ["test", "--config", "quickstart.yaml", "--model.warm_start", adapter],
}
EXTRAS = {"serve": "openai", "harness": "lm_eval"}


@pytest.fixture(params=COMMANDS)
def command(request):
    """``command(adapter)``: the command line of each command in turn."""
    if request.param in EXTRAS:
        pytest.importorskip(EXTRAS[request.param], reason=f"needs the extra {request.param}")
    return COMMANDS[request.param]


@pytest.fixture
def adapter(tiny_backbone, working_folder):
    save_random_adapter(working_folder / "adapter", tiny_backbone)
    return "adapter"


@pytest.fixture
def run(adapter):
    """A run's folder with the adapters ``last`` and ``best-step=3``."""
    for name in ("last", "best-step=3"):
        shutil.copytree(adapter, f"runs/version_0/checkpoints/{name}")
    return "runs/version_0"


@pytest.fixture
def hub(adapter, monkeypatch):
    """The hub with one adapter, ``someone/adapter``."""

    def download(name, allow_patterns):
        if name != "someone/adapter":
            raise OSError("401 Client Error. See the documentation.")
        assert allow_patterns == ["adapter_config.json", "adapter_model.safetensors"]
        return "adapter"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return "someone/adapter"


@pytest.mark.parametrize("given", ["runs/version_0", "runs/version_0/checkpoints"])
def test_run_folder_stands_for_its_last_adapter(run, given):
    assert adapter_folder(given) == "runs/version_0/checkpoints/last"
    Path("runs/version_0/checkpoints/last").rename("elsewhere")
    assert adapter_folder(given) == "runs/version_0/checkpoints/best-step=3"


@pytest.mark.parametrize("given", ["adapter", "./adapter", "nowhere", "adapter/nowhere", "a/b/c", "/no/no"])
def test_other_arguments_stay_as_they_are(adapter, given):
    assert adapter_folder(given) == given


@pytest.mark.parametrize("given", ["", " "])
def test_empty_argument_is_one_sentence(adapter, command, capsys, given):
    """Also where the working folder is an adapter folder."""
    for file in Path(adapter).iterdir():
        shutil.copy(file, ".")
    assert main(command(given)) == 2
    assert re.search(f": {given!r}; accepted: (an adapter folder|a path)", capsys.readouterr().err)


def test_whole_model_is_named_as_such(tiny_backbone):
    with pytest.raises(ConfigError, match=r"holds a whole model, without an adapter; .* is a --backbone for"):
        adapter_folder(str(tiny_backbone))


def test_adapter_on_the_hub_is_fetched(hub):
    assert adapter_folder(hub) == "adapter"
    with pytest.raises(ConfigError) as caught:
        adapter_folder("someone/else", "ADAPTER")
    assert str(caught.value) == (
        "ADAPTER: 'someone/else' is no folder here and cannot be fetched from the hub (OSError: 401 Client "
        f"Error); accepted: {ACCEPTED}"
    )


def test_folder_here_comes_before_the_hub(hub):
    shutil.copytree("adapter", hub)
    assert adapter_folder(hub) == hub


def test_command_names_the_adapters_of_a_run_without_a_last_one(command, run, capsys, no_loading):
    Path("runs/version_0/checkpoints/last").rename("runs/version_0/checkpoints/other")
    assert main(command(run)) == 2
    assert "runs/version_0 holds 2 adapters; accepted: one of runs/version_0/check" in capsys.readouterr().err


def test_command_fetches_an_adapter_from_the_hub(command, hub, capsys, no_loading):
    assert main(command("someone/else")) == 2
    assert "'someone/else' is no folder here and cannot be fetched" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "hub"])
def test_generate_answers_with_the_folder(request, kind, capsys):
    given = request.getfixturevalue(kind)
    assert main([*COMMANDS["generate"](given), "--max_new_tokens", "5"]) == 0
    assert f"{adapter_folder(given)} (" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "hub"])
def test_chat_answers_with_the_folder(request, kind, monkeypatch, capsys):
    given = request.getfixturevalue(kind)
    monkeypatch.setattr("gatera_lightning.cli.commands.chat.input_lines", lambda _: iter(["Hello"]))
    assert main([*COMMANDS["chat"](given), "--max_new_tokens", "5"]) == 0
    assert f"{adapter_folder(given)} (" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["run", "hub"])
def test_gates_names_the_folder(request, kind):
    given = request.getfixturevalue(kind)
    assert main([*COMMANDS["gates"](given), "--text", "Hello"]) == 0
    (found,) = json.loads(Path("gates.json").read_text())["adapters"]
    assert found["source"]["adapter"] == adapter_folder(given)


@pytest.mark.parametrize("kind", ["run", "hub"])
def test_export_reads_the_folder(request, kind):
    assert main(COMMANDS["export"](request.getfixturevalue(kind))) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (Path("exported") / name).read_bytes() == (Path("adapter") / name).read_bytes()


def test_adapter_with_a_position_gate_is_refused_where_nothing_gives_its_mask(
    command, tiny_backbone, working_folder, monkeypatch, capsys
):
    save_random_adapter(working_folder / "draft", tiny_backbone, gate="position")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    flags = command("draft")
    if flags[0] == "test":
        flags += ["--model.backbone.id", str(tiny_backbone), "--model.adapter.gate", "position"]
    elif flags[0] == "export":
        flags += ["--format", "merged"]
    assert main(flags) == 2
    assert "a 'position' gate" in capsys.readouterr().err
