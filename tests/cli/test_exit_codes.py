"""Exit codes and messages of errors; rank 0 prints an error that all ranks raise."""

import pytest
from torch.distributed import DistNetworkError

from gatera_lightning.cli import exit_codes, lightning_cli
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


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_PROCID", None])
@pytest.mark.parametrize("rank", [0, 1])
def test_report_error_gives_rank_zero_time_to_print(monkeypatch, capsys, launcher, rank):
    """torchrun and srun end all ranks once one has ended, which may be another than rank 0."""
    waited = []
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    monkeypatch.setattr(exit_codes, "global_rank", lambda: rank)
    monkeypatch.setattr(exit_codes.time, "sleep", waited.append)
    error = ConfigError("rows: differ", on_every_rank=True)
    assert exit_codes.report_error(error) == exit_codes.ExitCode.USAGE
    assert ("rows: differ" in capsys.readouterr().err) == (rank == 0)
    assert bool(waited) == (rank == 1 and launcher is not None)
