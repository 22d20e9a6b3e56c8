"""Environment variables are checked, and the streams prepared, before PyTorch is imported."""

import subprocess
import sys

import pytest

from gatera_lightning.cli.environment import check_environment
from gatera_lightning.cli.main import main
from gatera_lightning.errors import ConfigError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("MASTER_PORT", "RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "70000"),
        ("MASTER_PORT", ""),
        ("RANK", "first"),
        ("RANK", "-1"),
        ("WORLD_SIZE", "2.0"),
        ("LOCAL_RANK", "x"),
        ("SLURM_NTASKS", "two"),
        ("SLURM_PROCID", ""),
        ("OMP_NUM_THREADS", "all"),
        ("OMP_NUM_THREADS", "0"),
        ("SLURM_RESTART_COUNT", "abc"),
        ("SLURM_RESTART_COUNT", "-1"),
        ("PL_GLOBAL_SEED", "abc"),
        ("PL_GLOBAL_SEED", "4294967296"),
    ],
)
def test_variable_that_libraries_would_misread_is_refused(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    assert main(["compare", "a", "b"]) == 2
    assert f"  - {name} (environment variable): {value!r}; accepted: " in capsys.readouterr().err


def test_rank_beyond_world_size_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match=r"^RANK \(environment variable\): 2, and WORLD_SIZE is 2; accepted: less"
    ):
        check_environment()


def test_usual_variables_pass(monkeypatch):
    for name, value in {
        "MASTER_PORT": "29500",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "SLURM_NTASKS": "4",
        "OMP_NUM_THREADS": "4,2",
        "SLURM_RESTART_COUNT": "1",
        "PL_GLOBAL_SEED": "4294967295",
    }.items():
        monkeypatch.setenv(name, value)
    check_environment()


PROBE = """
import os, sys, threading, warnings
from gatera_lightning.cli.environment import set_up_process
set_up_process(show_traceback=False)
warnings.warn("old", FutureWarning)
warnings.warn("gatera_lightning.module has moved", FutureWarning)
warnings.warn("file \\x1b[2J")
class Broken:
    def __del__(self):
        raise KeyError("finalizer")
Broken()
thread = threading.Thread(target=lambda: {}["thread"])
thread.start(); thread.join()
print("\\u00d7 \\udc80")
print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"], os.environ["TQDM_DISABLE"])
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_process_is_quiet_and_prints_any_character(encoding):
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, env=environment)
    assert done.returncode == 0
    times = "×" if encoding == "utf-8" else "\\xd7"
    assert done.stdout.decode() == f"{times} \\udc80\nFalse PASSIVE 1\n"
    errors = done.stderr.decode()
    assert "gatera_lightning.module has moved" in errors
    assert "background thread failed: KeyError: 'thread'" in errors
    assert "file \\u001b[2J" in errors
    assert not any(word in errors for word in ("Traceback", "old", "finalizer"))
