"""Fixtures of the command line's tests: an empty working folder, a tiny recipe, and printed output."""

import pytest
import yaml
from tiny_backbone import tiny_args
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning.cli.main import main


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """An empty working folder for each test."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(tiny_backbone):
    """Flags of a tiny recipe, for any subcommand that takes those of ``fit``."""
    return ["--config", "quickstart.yaml", *tiny_args(tiny_backbone)]


@pytest.fixture
def fit(recipe):
    """The command line of a tiny ``fit``; flags may follow."""
    return ["fit", *recipe]


@pytest.fixture
def no_weights(monkeypatch):
    """Make loading weights fail."""
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )


@pytest.fixture
def no_loading(monkeypatch, no_weights):
    """Make loading weights or a tokenizer fail."""
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("a tokenizer was loaded")
    )


@pytest.fixture
def problems(capsys):
    """``problems(*args)``: what a command line reports that exits with 2 and prints nothing else."""

    def report(*args):
        assert main(args) == 2
        out, error = capsys.readouterr()
        assert out == ""
        return [line.removeprefix("  - ") for line in error.splitlines() if line.startswith("  - ")]

    return report


@pytest.fixture
def parser_error(capsys):
    """``parser_error(*args)``: the one line about a command line that the parser rejects."""

    def report(*args):
        assert main(args) == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.count("\n") == 1
        return error.removeprefix("python -m gatera_lightning: ").rstrip("\n")

    return report


@pytest.fixture
def help_text(capsys):
    """``help_text(*args)``: the help that a command line prints, without line breaks."""

    def read(*args):
        with pytest.raises(SystemExit) as caught:
            main([*args, "--help"])
        assert caught.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    return read


@pytest.fixture
def print_config(capsys):
    """``print_config(*args)``: what ``--print_config`` prints, parsed."""

    def read(*args):
        with pytest.raises(SystemExit) as caught:
            main([*args, "--print_config"])
        assert caught.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return read
