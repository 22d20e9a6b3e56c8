"""A run ended by a signal at any moment saves at a safe point and resumes bit for bit."""

import os
import random
import signal
import time

import pytest
from fit_script import Job, run
from killed_runs import SETTINGS, assert_bit_equal, finish, start, steps, wait_until

TIMES = int(os.environ.get("GATERA_PREEMPTIONS", "2"))


@pytest.fixture(scope="module")
def uninterrupted(tiny_backbone, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    run(Job(str(tiny_backbone), str(out), **SETTINGS))
    return out


def preempt(backbone, out, number, count, send=os.kill, **job):
    """Start a run, send it a signal after ``count`` more steps, and check how it ends."""
    done = len(steps(out))
    process = start(backbone, out, preempt=True, step_seconds=0.05, **job)
    assert wait_until(lambda: len(steps(out)) >= done + count, process)
    time.sleep(0.1 * random.Random(count).random())  # at any moment of a step
    send(process.pid, number)
    assert process.wait(timeout=60) == 75, (out / "output.txt").read_text()[-3000:]
    assert "preempted at optimizer step" in (out / "output.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_preempted_run_resumes_bit_equal(tiny_backbone, tmp_path, uninterrupted, number):
    """In the middle of an epoch, and at a step that validation follows."""
    for count in (2, 2, 3):
        preempt(tiny_backbone, tmp_path, number, count)
    finish(start(tiny_backbone, tmp_path), tmp_path)
    assert_bit_equal(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_signal_to_the_process_group_spares_the_loader_workers(
    tiny_backbone, tmp_path, uninterrupted, number
):
    """SLURM sends it to all processes; a worker that dies of it would end the run before it is saved."""
    preempt(tiny_backbone, tmp_path, number, 3, send=os.killpg, workers=1)
    finish(start(tiny_backbone, tmp_path, workers=1), tmp_path)
    assert_bit_equal(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(120 + 60 * TIMES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_signal_to_one_rank_preempts_both(tiny_backbone, tmp_path, strategy):
    """The other rank learns of it at the end of the step, so no rank waits forever."""
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "preempted"
    for folder in (uninterrupted, out):
        folder.mkdir()
    finish(start(tiny_backbone, uninterrupted, strategy=strategy), uninterrupted)
    for number in range(TIMES):
        if steps(out) and steps(out)[-1][0] >= 10:
            break
        preempt(
            tiny_backbone,
            out,
            (signal.SIGUSR1, signal.SIGTERM)[number % 2],
            1 + number % 3,
            strategy=strategy,
        )
    finish(start(tiny_backbone, out, strategy=strategy), out)
    assert_bit_equal(uninterrupted, out, ranks=2)
