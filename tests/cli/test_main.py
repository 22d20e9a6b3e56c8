"""The program: its subcommands and their help."""

import importlib
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from tiny_backbone import run_program

import gatera_lightning
from gatera_lightning import __main__ as program
from gatera_lightning.cli.commands import ALIASES, SUMMARIES, load_subcommand
from gatera_lightning.cli.main import main


@pytest.mark.parametrize("name", SUMMARIES)
def test_subcommand_is_function_in_module_of_same_name(name, help_text):
    module = importlib.import_module(f"gatera_lightning.cli.commands.{name}")
    assert load_subcommand(name) is getattr(module, name)
    usage = "[options] fit" if name == "demo" else name  # demo takes the flags of fit
    assert f"usage: python -m gatera_lightning {usage} " in help_text(name)


def test_alias_loads_subcommand(help_text):
    for alias, name in ALIASES.items():
        assert load_subcommand(alias) is load_subcommand(name)
    assert "estimate" in help_text("plan")


def test_help_lists_all_subcommands(help_text):
    text = help_text()
    for name, summary in SUMMARIES.items():
        assert f"{name}: {summary}" in text
    assert all(name in text for name in ("fit", "validate", "test", "predict"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tset", "test"), ("Fit", "fit"), ("previw", "preview"), ("compair", "compare"), ("train", None)],
)
def test_unknown_subcommand_names_near_miss_before_anything_is_imported(parser_error, name, meant):
    error = parser_error(name, "--config", "quickstart.yaml")
    accepted = ", ".join(["fit, validate, test, predict", *SUMMARIES, *ALIASES])
    hint = f"; did you mean {meant!r}?" if meant else ""
    assert error == f"COMMAND: {name!r} is unknown; accepted: {accepted}{hint}"


def test_missing_subcommand_is_named(parser_error):
    assert parser_error().startswith("COMMAND: is not set; accepted: fit, ")


def test_subcommand_imports_no_other_subcommand():
    script = (
        "import sys; from gatera_lightning.cli.commands import load_subcommand; load_subcommand('compare');"
        "print([name for name in sys.modules if name.startswith('gatera_lightning.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "commands.compare" in done.stdout
    assert "lightning_cli" not in done.stdout
    assert "commands.chat" not in done.stdout


def test_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gatera_lightning {gatera_lightning.__version__}\n"


def test_program_runs_as_module(working_folder):
    assert "usage: python -m gatera_lightning" in run_program("--help", cwd=working_folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_the_import_ends_the_program_with_one_line(number, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gatera_lightning.cli.main", None)  # its import raises ImportError
    with pytest.raises(ImportError):
        program.run()

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "gatera_lightning.cli.main":
                signal.raise_signal(number)

    class CatchingFinder:
        """Catches the exception, as libraries do that try their imports."""

        def find_spec(self, name, path=None, target=None):
            with suppress(BaseException):
                Finder().find_spec(name)

    for finder in (Finder, CatchingFinder):
        monkeypatch.delitem(sys.modules, "gatera_lightning.cli.main", raising=False)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "meta_path", [finder(), *sys.meta_path])
            assert program.run() == 128 + number
        expected = f"python -m gatera_lightning: ended by {number.name}; its work is not complete\n"
        assert capsys.readouterr().err == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("caught_in", ["import", "run"])
def test_signal_that_a_library_caught_ends_the_subcommand(caught_in, number, monkeypatch, capsys):
    """Modules whose import a signal has cut are incomplete, and fail later for another reason."""

    def caught(*_):
        with suppress(BaseException):
            signal.raise_signal(number)

    def fails(*_):
        caught()
        raise RecursionError

    def load(name):
        if caught_in == "import":
            caught()
        return fails

    monkeypatch.setitem(main.__globals__, "load_subcommand", load)
    assert main(["compare"]) == 128 + number
    ended = f"ended by {number.name} during compare; its work is not complete"
    assert capsys.readouterr().err == f"python -m gatera_lightning: {ended}\n"
