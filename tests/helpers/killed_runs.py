"""Runs of ``fit_script.py`` that are killed and resumed."""

import json
import subprocess
import sys
import time

from fits import SCRIPT

SETTINGS = {"epochs": 3, "dropout": 0.2, "dtype": "float32", "keep": True}


def start(backbone, out, **job):
    """Start a run in its own process group; it resumes from the newest checkpoint in ``out``."""
    settings = json.dumps({"backbone": str(backbone), "out": str(out), "resume": "newest", **SETTINGS, **job})
    output = (out / "output.txt").open("a")
    command = [sys.executable, str(SCRIPT), settings]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, out, seconds=240):
    """Wait for a run to end without an error."""
    assert process.wait(timeout=seconds) == 0, (out / "output.txt").read_text()[-3000:]


def steps(out, rank=0):
    """Every step that was logged, as [step, loss, example ids]; a line that a kill cut off is left out."""
    file = out / f"steps_{rank}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("]")]


def wait_until(condition, process, seconds=120):
    """Return whether the condition came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError(f"nothing after {seconds} s")


def assert_bit_equal(uninterrupted, out, ranks=1):
    """Compare every step, also one that was taken twice, and the final adapter with the uninterrupted run."""
    for rank in range(ranks):
        expected = {step: rest for step, *rest in steps(uninterrupted, rank)}
        found = steps(out, rank)
        assert {step for step, *_ in found} == set(expected) == set(range(1, 13))
        assert all(rest == expected[step] for step, *rest in found)
    one, other = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (uninterrupted, out)
    )
    assert one == other
