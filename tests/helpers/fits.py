"""Start runs of ``fit_script.py``, and compare what they logged."""

import json
import math
import sys
from pathlib import Path

import pytest
from bounded_programs import run_bounded
from fit_script import Job, run
from perturbed_adapter import perturb_adapter
from safetensors.torch import load_file

from gatera_lightning import AdapterConfig, BackboneConfig, inject_adapters, save_adapter
from gatera_lightning.backbone.loading import load_backbone

SCRIPT = Path(__file__).parent / "fit_script.py"


def run_script(script, backbone, out, check=True, **job):
    """Run a script with the settings of a Job in another process."""
    settings = json.dumps({"backbone": str(backbone), "out": str(out), **job})
    done = run_bounded([sys.executable, str(script), settings], timeout=240)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def fit(backbone, out, check=True, strategy="single", **job):
    """Train in this process with one rank, in other processes with two."""
    out.mkdir(parents=True, exist_ok=True)
    if strategy == "single":
        return run(Job(str(backbone), str(out), **job))
    return run_script(SCRIPT, backbone, out, check, strategy=strategy, **job)


def save_tuned_adapter(backbone, out):
    """Save an adapter that changes what a backbone predicts, and return its path."""
    model = load_backbone(BackboneConfig(id=str(backbone), dtype="float64"))
    inject_adapters(model, AdapterConfig(rank=2, adapter_dtype="float64"))
    save_adapter(perturb_adapter(model, size=0.5), out)
    return str(out)


def read_losses(out):
    return [float.fromhex(text) for text in json.loads((out / "losses.json").read_text())]


def read_ids(out, rank=0):
    return json.loads((out / f"ids_{rank}.json").read_text())


def read_adapter(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def read(out):
    """Losses and gradient norms of every step, and the final adapter."""
    return read_losses(out), json.loads((out / "norms.json").read_text()), read_adapter(out)


def assert_same(out, reference, skipped=()):
    """Compare two runs up to rounding in float64.

    ``skipped`` are steps that were not taken, for which no norms are logged.
    """
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
    for step, (of_groups, norm) in enumerate(zip(logged, norms, strict=True)):
        assert step in skipped or math.hypot(*of_groups) == pytest.approx(norm, rel=1e-11)
    assert adapter.keys() == expected_adapter.keys()
    for name, tensor in adapter.items():
        assert (tensor - expected_adapter[name]).abs().max() < 1e-12, name
