"""Killed anywhere, even while a checkpoint is written, and resumed: the same losses, example ids and adapter, bit for bit.

``GATERA_KILLS`` says how many runs are killed at random; three by default, twenty under ``make stress``.
"""

import os
import random
import signal
import time

import pytest
from fit_script import Job, run
from killed_runs import SETTINGS, assert_equal_to, start, steps, wait_until

RUNS = int(os.environ.get("GATERA_KILLS", "3"))


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def reaches(out, process, count, *, in_write):
    """Whether so many steps were taken, and a checkpoint is half written, before the process ended."""
    draft = out / "checkpoints" / "last.ckpt.draft"
    return wait_until(lambda: len(steps(out)) >= count and (draft.exists() or not in_write), process)


@pytest.fixture(scope="module")
def whole(tiny_backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(Job(str(tiny_backbone), str(out), **SETTINGS))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_killed_at_a_random_moment(tiny_backbone, tmp_path, whole, number):
    """At a random moment of any of the twelve steps, every other time while half a file is written; then resumed to the end."""
    draw = random.Random(number)
    process = start(tiny_backbone, tmp_path, slow_write=0.05)
    assert reaches(tmp_path, process, draw.randint(0, 10), in_write=number % 2 == 1)
    time.sleep(0.04 * draw.random() if number % 2 else 0.1 * draw.random())
    assert process.poll() is None
    kill(process)
    process = start(tiny_backbone, tmp_path)
    assert process.wait(timeout=120) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert_equal_to(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "sharded"])
def test_two_processes_killed_in_mid_write(tiny_backbone, tmp_path, strategy):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    process = start(tiny_backbone, tmp_path / "whole", strategy=strategy)
    assert process.wait(timeout=240) == 0, (tmp_path / "whole" / "output.txt").read_text()[-3000:]
    out = tmp_path / "killed"
    process = start(tiny_backbone, out, strategy=strategy, slow_write=0.5)
    assert wait_until(lambda: len(steps(out)) >= 5 and list((out / "checkpoints").glob("*.draft")), process)
    kill(process)
    process = start(tiny_backbone, out, strategy=strategy)
    assert process.wait(timeout=240) == 0, (out / "output.txt").read_text()[-3000:]
    assert_equal_to(tmp_path / "whole", out, ranks=2)
