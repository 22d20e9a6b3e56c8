"""Runs of ``fit_script.py`` that are interrupted and resumed."""

import json
import subprocess
import sys
import time

from fits import SCRIPT

SETTINGS = {"epochs": 3, "dropout": 0.2, "dtype": "float32", "keep": True}


def start(backbone, out, **job):
    """A run in a process group of its own, which goes on from the newest checkpoint in its folder."""
    settings = json.dumps({"backbone": str(backbone), "out": str(out), "resume": "newest", **SETTINGS, **job})
    output = (out / "output.txt").open("a")
    command = [sys.executable, str(SCRIPT), settings]
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def steps(out, rank=0):
    file = out / f"steps_{rank}.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")]
        if file.exists()
        else []
    )


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


def assert_equal_to(whole, out, ranks=1):
    """Every step that was taken, however often, is the uninterrupted run's; and so is the adapter."""
    for rank in range(ranks):
        expected = {step: rest for step, *rest in steps(whole, rank)}
        found = steps(out, rank)
        assert {step for step, *_ in found} == set(expected) == set(range(1, 13))
        assert all(rest == expected[step] for step, *rest in found)
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (whole, out))
    assert one == other
