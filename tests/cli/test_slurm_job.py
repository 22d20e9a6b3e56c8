"""SLURM jobs: their batch scripts and time limits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gatera_lightning.cli.main import main
from gatera_lightning.cli.slurm_job import time_limit_seconds

# GATERA_RENEW_GOLDEN=1 python -m pytest tests/cli/test_slurm_job.py rewrites these files; read the diff.
GOLDEN = Path(__file__).parent / "golden" / "submit"
ELSEWHERE = ["--root", "/scratch/jobs", "--python", "/opt/env/bin/python"]
JOBS = {
    "one_gpu": [],  # all defaults; the paths of this machine are replaced below
    "two_nodes": [
        *("--nodes", "2", "--gpus-per-node", "4", "--partition", "long", "--account", "lab"),
        *("--time", "1-12:00:00", "--mem", "200G", "--cpus-per-task", "8", "--signal-seconds", "600"),
        *(
            "--setup",
            'module load cuda\nexport NCCL_DEBUG="WARN"',
            "--config",
            "overlays/fsdp.yaml",
            *ELSEWHERE,
        ),
    ],
    "cpu": ["--gpus-per-node", "0", "--processes-per-node", "2", "--trainer.logger", "null", *ELSEWHERE],
}


@pytest.mark.parametrize("name", JOBS)
def test_dry_run_prints_the_golden_script(name, recipe, capsys):
    assert main(["submit", "--dry-run", *recipe, *JOBS[name]]) == 0
    printed = capsys.readouterr().out.replace(sys.executable, "PYTHON").replace(os.getcwd(), "FOLDER")
    if os.environ.get("GATERA_RENEW_GOLDEN") == "1":
        (GOLDEN / f"{name}.sbatch").write_text(printed)
    assert printed == (GOLDEN / f"{name}.sbatch").read_text()
    assert os.listdir() == []


@pytest.mark.parametrize("name", JOBS)
def test_golden_script_is_valid_bash(name):
    subprocess.run(["bash", "-n", str(GOLDEN / f"{name}.sbatch")], check=True)


@pytest.mark.parametrize("name", JOBS)
def test_golden_script_passes_shellcheck(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "-S", "warning", str(GOLDEN / f"{name}.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:05:30", 3930),
        ("2-3", 183_600),
        ("2-3:04", 183_840),
        ("2-3:04:05", 183_845),
    ],
)
def test_time_limit_is_read_as_slurm_does(time, seconds):
    assert time_limit_seconds(time) == seconds
