"""Run SLURM's commands."""

import subprocess


def slurm(*command: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()
