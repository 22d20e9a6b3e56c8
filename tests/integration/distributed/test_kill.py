"""A run killed at any moment (loading, training, writing a checkpoint) resumes bit for bit.

``GATERA_KILLS`` is the number of runs killed at random: three by default, twenty under ``make stress``.
"""

import os
import random
import signal
import time

import pytest
from fit_script import Job, run
from killed_runs import SETTINGS, assert_bit_equal, finish, start, steps, wait_until

RUNS = int(os.environ.get("GATERA_KILLS", "3"))


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reaches(out, process, count, *, in_write):
    """Whether the run took so many steps, and is writing a checkpoint, before it ended."""
    temporary = out / "checkpoints" / "last.ckpt.tmp"
    return wait_until(lambda: len(steps(out)) >= count and (temporary.exists() or not in_write), process)


@pytest.fixture(scope="module")
def uninterrupted(tiny_backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(Job(str(tiny_backbone), str(out), **SETTINGS))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_run_killed_at_random_resumes_bit_equal(tiny_backbone, tmp_path, uninterrupted, number):
    moment = ("writing", "training", "loading")[number % 3]
    draw = random.Random(number)
    process = start(tiny_backbone, tmp_path, slow_write=0.05)
    if moment == "loading":
        time.sleep(4 * draw.random())
    else:
        assert reaches(tmp_path, process, draw.randint(0, 10), in_write=moment == "writing")
        time.sleep((0.04 if moment == "writing" else 0.1) * draw.random())
    assert process.poll() is None
    kill(process)
    finish(start(tiny_backbone, tmp_path), tmp_path)
    assert_bit_equal(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "sharded"])
def test_two_ranks_killed_while_writing_resume_bit_equal(tiny_backbone, tmp_path, strategy):
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "killed"
    for folder in (uninterrupted, out):
        folder.mkdir()
    finish(start(tiny_backbone, uninterrupted, strategy=strategy), uninterrupted)
    process = start(tiny_backbone, out, strategy=strategy, slow_write=0.5)
    assert wait_until(lambda: len(steps(out)) >= 5 and list((out / "checkpoints").glob("*.tmp")), process)
    kill(process)
    finish(start(tiny_backbone, out, strategy=strategy), out)
    assert_bit_equal(uninterrupted, out, ranks=2)
