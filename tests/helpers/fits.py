"""Runs of ``fit_script.py`` and comparisons of what they logged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from fit_script import Job, run
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "fit_script.py"


def fit(backbone, out, check=True, strategy="single", **job):
    """One process runs in this one; two are started."""
    out.mkdir(parents=True, exist_ok=True)
    if strategy == "single":
        return run(Job(str(backbone), str(out), **job))
    settings = json.dumps({"backbone": str(backbone), "out": str(out), "strategy": strategy, **job})
    done = subprocess.run(
        [sys.executable, str(SCRIPT), settings], capture_output=True, text=True, timeout=240
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def read(out):
    losses = [float.fromhex(x) for x in json.loads((out / "losses.json").read_text())]
    norms = json.loads((out / "norms.json").read_text())
    return losses, norms, load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same(out, reference, left_out=()):
    """``left_out`` are steps that were not taken, of which nothing is logged."""
    losses, norms, adapter = read(out)
    expected_losses, expected_norms, expected_adapter = read(reference)
    assert losses == pytest.approx(expected_losses, rel=1e-13)
    # Adam hides a wrong factor on the whole gradient, its norm does not.
    assert norms == pytest.approx(expected_norms, rel=1e-11)
    logged, expected_logged = (
        json.loads((folder / "logged_norms.json").read_text()) for folder in (out, reference)
    )
    for of_step, expected in zip(logged, expected_logged, strict=True):
        assert of_step == pytest.approx(expected, rel=1e-11)
    for number, (of_step, whole) in enumerate(
        zip(logged, norms, strict=True)
    ):  # of all gradients, before clipping
        assert number in left_out or math.hypot(*of_step) == pytest.approx(whole, rel=1e-11)
    assert adapter.keys() == expected_adapter.keys()
    for name, tensor in adapter.items():
        assert (tensor - expected_adapter[name]).abs().max() < 1e-12, name
