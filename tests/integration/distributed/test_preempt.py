"""A signal ends a run at a safe point, whenever it comes, and the resumed run is the uninterrupted one, bit for bit."""

import os
import random
import signal
import time

import pytest
from fit_script import Job, run
from killed_runs import SETTINGS, assert_equal_to, start, steps, wait_until

TIMES = int(os.environ.get("GATERA_PREEMPTIONS", "2"))


@pytest.fixture(scope="module")
def whole(tiny_backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(Job(str(tiny_backbone), str(out), **SETTINGS))
    return out


def preempted(backbone, out, number, count, send=os.kill, **job):
    """Start a run, send it a signal after ``count`` more steps, and see it end as it should."""
    done = len(steps(out))
    process = start(backbone, out, preempt=True, step_seconds=0.05, **job)
    assert wait_until(lambda: len(steps(out)) >= done + count, process)
    time.sleep(0.1 * random.Random(count).random())  # anywhere in a step
    send(process.pid, number)
    assert process.wait(timeout=60) == 75, (out / "output.txt").read_text()[-3000:]
    assert "preempted at optimizer step" in (out / "output.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_one_process(tiny_backbone, tmp_path, whole, number):
    """In the middle of an epoch, and at a step that a validation follows."""
    for count in (2, 2, 3):
        preempted(tiny_backbone, tmp_path, number, count)
    process = start(tiny_backbone, tmp_path)
    assert process.wait(timeout=120) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert_equal_to(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_to_every_process_spares_the_loaders_workers(tiny_backbone, tmp_path, whole, number):
    """As SLURM sends it: a worker that dies of it would end the run before it is saved."""
    preempted(tiny_backbone, tmp_path, number, 3, send=os.killpg, workers=1)
    process = start(tiny_backbone, tmp_path, workers=1)
    assert process.wait(timeout=120) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    assert_equal_to(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * TIMES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_of_which_one_hears_the_signal(tiny_backbone, tmp_path, strategy):
    """The others learn of it at the end of a step; none waits for ever."""
    for name in ("whole", "preempted"):
        (tmp_path / name).mkdir()
    process = start(tiny_backbone, tmp_path / "whole", strategy=strategy)
    assert process.wait(timeout=240) == 0, (tmp_path / "whole" / "output.txt").read_text()[-3000:]
    out = tmp_path / "preempted"
    for number in range(TIMES):
        if steps(out) and steps(out)[-1][0] >= 10:
            break
        preempted(
            tiny_backbone,
            out,
            (signal.SIGUSR1, signal.SIGTERM)[number % 2],
            1 + number % 3,
            strategy=strategy,
        )
    process = start(tiny_backbone, out, strategy=strategy)
    assert process.wait(timeout=240) == 0, (out / "output.txt").read_text()[-3000:]
    assert_equal_to(tmp_path / "whole", out, ranks=2)
