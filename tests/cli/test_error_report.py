"""How the program ends: exit codes, one message, tracebacks on request, signals and closed output."""

import signal
import subprocess
import sys

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed import DistNetworkError

from gatera_lightning.cli import error_report, lightning_cli
from gatera_lightning.cli.error_report import report
from gatera_lightning.cli.main import main
from gatera_lightning.errors import (
    AdapterFileError,
    CheckpointError,
    ConfigError,
    Interrupted,
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
        (KeyError("bug"), 1, "fit failed: KeyError: 'bug'; run it again with --traceback"),
        (
            Interrupted(signal.SIGTERM, "test"),
            143,
            "ended by SIGTERM during test; its work is not complete\n",
        ),
        (KeyboardInterrupt(), 130, "ended by SIGINT during fit; its work is not complete\n"),
        (SIGTERMException(), 143, "ended by SIGTERM during fit; its work is not complete\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_error_has_exit_code_and_message(raises, capsys, error, code, message):
    raises(error)
    assert main(["fit"]) == code
    assert capsys.readouterr().err.startswith(f"python -m gatera_lightning: {message}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_import_that_a_signal_broke_ends_by_the_signal(number, capsys):
    error = ImportError("Could not import module 'x'")
    assert report(error, "harness", number, show_traceback=False) == 128 + number
    ended = f"ended by {number.name} during harness; its work is not complete"
    assert capsys.readouterr().err == f"python -m gatera_lightning: {ended}\n"
    assert report(error, "harness", None, show_traceback=False) == 1


def test_signal_that_ends_a_server_leaves_no_work(capsys):
    assert report(Interrupted(signal.SIGTERM), "serve", None, show_traceback=False) == 143
    assert capsys.readouterr().err == "python -m gatera_lightning: ended by SIGTERM during serve\n"


def test_rendezvous_failure_names_address_and_port(raises, capsys, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    raises(DistNetworkError("address already in use\nmore"))
    assert main(["fit"]) == 1
    error = capsys.readouterr().err
    assert "rendezvous failed at node7, port 29500: address already in use\n" in error
    assert "set MASTER_PORT to a free one" in error


@pytest.mark.parametrize("switch", ["flag", "variable", None])
def test_traceback_is_one_switch_away(raises, capsys, monkeypatch, switch):
    monkeypatch.setenv("GATERA_TRACEBACK", "1" if switch == "variable" else "0")
    raises(ConfigError("rank: 0"))
    assert main(["fit", "--traceback"] if switch == "flag" else ["fit"]) == 2
    error = capsys.readouterr().err
    assert ("Traceback (most recent call last)" in error) == (switch is not None)
    assert error.endswith("1 problem in the configuration:\n  - rank: 0\n")


def test_control_characters_of_others_are_escaped(raises, capsys):
    raises(ConfigError("file: '\x1b[2J\u202e\x9b.json'"))
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.endswith("file: '\\u001b[2J\\u202e\\u009b.json'\n")


def test_error_of_one_rank_names_the_rank(raises, capsys, monkeypatch):
    monkeypatch.setattr(error_report, "global_rank", lambda: 3)
    raises(ConfigError("rank: 0"))
    assert main(["fit"]) == 2
    assert capsys.readouterr().err.startswith("python -m gatera_lightning (rank 3): 1 problem")


def test_signal_is_reported_by_rank_zero_alone(capsys, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setattr(error_report, "global_rank", lambda rank=rank: rank)
        assert report(Interrupted(signal.SIGTERM), "test", None, show_traceback=False) == 143
    assert capsys.readouterr().err.count("ended by SIGTERM") == 1


def test_config_error_message_lists_all_problems():
    assert str(ConfigError("one")) == "one"
    assert str(ConfigError(["one", "two"])) == "  - one\n  - two"


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_PROCID", None])
@pytest.mark.parametrize("rank", [0, 1])
def test_report_gives_rank_zero_time_to_print(monkeypatch, capsys, launcher, rank):
    """torchrun and srun end all ranks once one has ended, which may be another than rank 0."""
    waited = []
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "1")
    monkeypatch.setattr(error_report, "global_rank", lambda: rank)
    monkeypatch.setattr(error_report.time, "sleep", waited.append)
    error = ConfigError("rows: differ", on_every_rank=True)
    assert report(error, "fit", None, show_traceback=False) == 2
    assert ("rows: differ" in capsys.readouterr().err) == (rank == 0)
    assert bool(waited) == (rank == 1 and launcher is not None)


def replaced(error, replacement):
    """The exception that Lightning or rich raises in place of another."""
    try:
        try:
            raise error
        except BaseException:
            raise replacement from None
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("replacement", [SystemExit(1), RuntimeError("worker killed"), ImportError("numpy")])
def test_interruption_is_recognized_behind_another_exception(capsys, replacement):
    assert (
        report(replaced(KeyboardInterrupt(), replacement), "fit", signal.SIGINT, show_traceback=False) == 130
    )
    assert report(SystemExit(0), "fit", signal.SIGINT, show_traceback=False) is None  # handled before


def test_broken_pipe_of_another_kind_is_an_error(capsys):
    """Only standard output and error end the program quietly, and not the pipe to some other program."""
    assert report(BrokenPipeError(32, "Broken pipe"), "submit", None, show_traceback=False) == 1
    assert "submit failed" in capsys.readouterr().err


SCRIPT = "import sys; from gatera_lightning.cli.main import main; sys.exit(main())"


def test_closed_output_ends_quietly():
    pipe = f"{sys.executable} -c '{SCRIPT}' compare --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_error(stream):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{SCRIPT}' fitt {stream}"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_full_disk_behind_standard_output_is_reported():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{SCRIPT}' compare --help > /dev/full"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no space left on device" in done.stderr
