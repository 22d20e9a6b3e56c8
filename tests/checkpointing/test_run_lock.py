"""A run folder belongs to one run, also after a kill, and names the run that holds it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from gatera_lightning.checkpointing import run_lock
from gatera_lightning.checkpointing.run_lock import LOCK_FILE, claim, release

HOLD = """
import sys
from pathlib import Path
from gatera_lightning.checkpointing.run_lock import claim
print(claim(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder ``run``; ``SLURM_JOB_ID`` is 7."""
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "None\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    """This process is no SLURM job, and holds no folder when the test ends."""
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    yield
    for folder in list(run_lock._held):
        release(folder)


def test_folder_of_a_running_process_is_refused_with_its_name(other, tmp_path):
    problem = claim(tmp_path / "run")
    assert f"belongs to a run that is still going: process {other.pid} on " in problem
    assert "SLURM job 7, started 20" in problem
    assert "accepted: another folder" in problem
    assert claim(tmp_path / "another") is None


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_folder_of_a_dead_process_is_free(other, tmp_path, end):
    other.send_signal(end)
    other.wait()
    assert claim(tmp_path / "run") is None
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("job", "restarts", "refused"),
    [("7", "2", False), ("7", "1", True), ("8", "2", True), ("7", None, True)],
    ids=["requeued", "same start", "other job", "no count"],
)
def test_requeued_job_takes_over_its_own_lock(other, tmp_path, monkeypatch, job, restarts, refused):
    """A file server may keep the lock of a node that died; SLURM requeues a job once it has ended."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert (claim(tmp_path / "run") is not None) == refused


def test_process_keeps_what_it_holds(tmp_path):
    assert claim(tmp_path) is None
    assert claim(tmp_path / "." / "") is None
    release(tmp_path)
    release(tmp_path)
    assert claim(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00"], ids=repr)
def test_lock_file_without_an_owner_is_no_obstacle(tmp_path, content):
    (tmp_path / LOCK_FILE).write_text(content)
    assert claim(tmp_path) is None


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only")])
def test_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch, error):
    """A root user may write everywhere, so the refusal of the system is simulated."""

    def refuse(*args, **options):
        raise error

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert claim(tmp_path).endswith(f"cannot be written ({error.strerror}); accepted: another one")


def test_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    assert claim(tmp_path) is None
    assert "cannot be locked against a second run (Function not implemented)" in caplog.text


def test_link_at_the_name_of_the_lock_is_refused(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "precious")
    assert "has a link .run.lock" in claim(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"
