"""Killed anywhere, even while a checkpoint is written, and resumed: the same losses, example ids and adapter, bit for bit.

``GATERA_KILLS`` says how many runs are killed at random; three by default, twenty under ``make stress``.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from fit_script import Job, run
from test_parity import SCRIPT

RUNS = int(os.environ.get("GATERA_KILLS", "3"))
SETTINGS = {"epochs": 3, "dropout": 0.2, "dtype": "float32", "keep": True}


def start(backbone, out, **job):
    """A run in a process group of its own, which goes on from the newest checkpoint in its folder."""
    settings = json.dumps({"backbone": str(backbone), "out": str(out), "resume": "newest", **SETTINGS, **job})
    output = (out / "output.txt").open("a")
    command = [sys.executable, str(SCRIPT), settings]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def steps(out, rank=0):
    file = out / f"steps_{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")] if file.exists() else []


def wait_until(condition, process, seconds=120):
    """Whether it came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError(f"nothing after {seconds} s")


def reaches(out, process, count, *, in_write):
    """Whether so many steps were taken, and a checkpoint is half written, before the process ended."""
    draft = out / "checkpoints" / "last.ckpt.draft"
    return wait_until(lambda: len(steps(out)) >= count and (draft.exists() or not in_write), process)


def assert_equal_to(whole, out, ranks=1):
    """Every step that was taken, however often, is the uninterrupted run's; and so is the adapter."""
    for rank in range(ranks):
        expected = {step: rest for step, *rest in steps(whole, rank)}
        found = steps(out, rank)
        assert {step for step, *_ in found} == set(expected) == set(range(1, 13))
        assert all(rest == expected[step] for step, *rest in found)
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, out))
    assert one == other


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
