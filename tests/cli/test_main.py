"""The program: its subcommands, its help, and its exit codes."""

import importlib
import subprocess
import sys

import pytest
from tiny_backbone import run_program

from gatera_lightning.cli import exit_codes, lightning_cli
from gatera_lightning.cli.commands import ALIASES, SUMMARIES, load_subcommand
from gatera_lightning.cli.console import set_up_console
from gatera_lightning.cli.main import main
from gatera_lightning.errors import (
    AdapterFileError,
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    Preempted,
)


@pytest.fixture
def raises(monkeypatch):
    """``raises(error)``: let ``fit`` raise an error."""

    def replace(error):
        def fail(_):
            raise error

        monkeypatch.setattr(lightning_cli, "GateRACLI", fail)

    return replace


@pytest.mark.parametrize("name", SUMMARIES)
def test_subcommand_is_function_in_module_of_same_name(name, help_text):
    module = importlib.import_module(f"gatera_lightning.cli.commands.{name}")
    assert load_subcommand(name) is getattr(module, name)
    assert f"usage: python -m gatera_lightning {name} " in help_text(name)


def test_alias_loads_subcommand(help_text):
    for alias, name in ALIASES.items():
        assert load_subcommand(alias) is load_subcommand(name)
    assert "estimate" in help_text("plan")


def test_help_lists_all_subcommands(help_text):
    text = help_text()
    for name, summary in SUMMARIES.items():
        assert f"{name}: {summary}" in text
    assert all(name in text for name in ("fit", "validate", "test", "predict"))


def test_unknown_subcommand_lists_lightnings(parser_error):
    assert "'fit', 'validate', 'test', 'predict'" in parser_error("train")


def test_subcommand_imports_no_other_subcommand():
    script = (
        "import sys; from gatera_lightning.cli.commands import load_subcommand; load_subcommand('compare');"
        "print([name for name in sys.modules if name.startswith('gatera_lightning.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "commands.compare" in done.stdout
    assert "lightning_cli" not in done.stdout
    assert "commands.chat" not in done.stdout


def test_program_runs_as_module(working_folder):
    assert "usage: python -m gatera_lightning" in run_program("--help", cwd=working_folder)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("rank: 0"), 2, "1 problem in the configuration:\n  - rank: 0\n"),
        (ConfigError(["a: 1", "b: 2"]), 2, "2 problems in the configuration:\n  - a: 1\n  - b: 2\n"),
        (AdapterFileError("no adapter here"), 2, "no adapter here\n"),
        (NonFiniteLossError("the loss is nan"), 1, "the loss is nan\n"),
        (CheckpointError("corrupt"), 1, "corrupt\n"),
        (Preempted("last.ckpt", 3, requeued=True), 0, "preempted at optimizer step 3"),
        (Preempted("last.ckpt", 3, requeued=False), 75, "preempted at optimizer step 3"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_has_exit_code_and_message(raises, capsys, error, code, message):
    raises(error)
    assert main(["fit"]) == code
    assert capsys.readouterr().err.startswith(f"python -m gatera_lightning: {message}")


def test_rendezvous_failure_names_address_and_port(raises, capsys, monkeypatch):
    from torch.distributed import DistNetworkError

    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    raises(DistNetworkError("address already in use\nmore"))
    assert main(["fit"]) == 1
    error = capsys.readouterr().err
    assert "rendezvous failed at node7, port 29500: address already in use\n" in error
    assert "set MASTER_PORT to a free one" in error


def test_unexpected_error_keeps_its_traceback(raises):
    raises(KeyError("bug"))
    with pytest.raises(KeyError, match="bug"):
        main(["fit"])


def test_error_of_one_rank_names_the_rank(raises, capsys, monkeypatch):
    monkeypatch.setattr(exit_codes, "global_rank", lambda: 3)
    raises(ConfigError("rank: 0"))
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("python -m gatera_lightning (rank 3): 1 problem")


def test_config_error_message_lists_all_problems():
    assert str(ConfigError("one")) == "one"
    assert str(ConfigError(["one", "two"])) == "  - one\n  - two"


def test_console_leaves_configured_log_alone(caplog):
    import logging

    package_log = logging.getLogger("gatera_lightning")
    handlers, level = list(package_log.handlers), package_log.level
    set_up_console()  # pytest has configured the root logger
    assert (package_log.handlers, package_log.level) == (handlers, level)
