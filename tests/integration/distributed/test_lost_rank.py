"""A rank that is killed ends the other one, with one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_backbone import tiny_args

pytestmark = pytest.mark.slow

STRATEGIES = {"ddp": ["--trainer.strategy", "ddp"], "fsdp2": ["--config", "overlays/fsdp.yaml"]}


def children(process):
    """Return the process ids of a process's children that run this package."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process and b"gatera_lightning" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # the process has ended
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the other rank in /proc")
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_rank_ends_the_other_with_one_sentence(strategy, lost, tiny_backbone, tmp_path):
    command = ["fit", "--config", "quickstart.yaml", *STRATEGIES[strategy], *tiny_args(tiny_backbone)]
    command += ["--trainer.devices", "2", "--trainer.max_steps", "100000", "--trainer.max_epochs", "-1"]
    command += ["--trainer.limit_val_batches", "0", "--trainer.logger", "false"]
    command += ["--gate_heatmap.every_n_steps", "0", "--checkpoint.every_n_steps", "1"]
    with (tmp_path / "output.txt").open("w") as output:
        program = subprocess.Popen(
            [sys.executable, "-m", "gatera_lightning", *command],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 120
            while not list(tmp_path.rglob("last.ckpt")):
                assert program.poll() is None, (tmp_path / "output.txt").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (other,) = children(program.pid)
            before = len((tmp_path / "output.txt").read_text().splitlines())
            os.kill((program.pid, other)[lost], signal.SIGKILL)
            start = time.monotonic()
            if lost == 0:
                program.wait(timeout=60)
                while Path(f"/proc/{other}").exists():
                    assert time.monotonic() - start < 60
                    time.sleep(0.1)
            else:
                assert program.wait(timeout=60) not in (0, -signal.SIGKILL)
            print(f"{strategy}, rank {lost}: the other ended after {time.monotonic() - start:.1f} s")
        finally:
            for process in [program.pid, *children(program.pid)]:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            program.wait()
    said = (tmp_path / "output.txt").read_text().splitlines()[before:]
    said = [line for line in said if not line.startswith("step ")]
    print(*said, sep="\n")
    assert len([line for line in said if line.startswith("python -m gatera_lightning")]) == 1, said
    assert len(said) <= 3, said
    assert not any("Traceback" in line for line in said)
