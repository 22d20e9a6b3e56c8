"""The entropy term of ``GateEntropyMixin`` on two ranks is that of one rank with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched_ranks import free_port, is_launcher_variable, torchrun_environment
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "helpers" / "entropy_ranks_script.py"


def train(backbone, folder, ranks, accumulate):
    """Train four steps of eight rows on some ranks; return the logs and the adapter's tensors."""
    inherited = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
    rows = 8 // ranks // accumulate
    port, programs = free_port(), []
    for rank in range(ranks):
        own = torchrun_environment(rank, port, ranks) if ranks > 1 else {}
        paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
        programs.append(
            subprocess.Popen(
                [sys.executable, *map(str, (SCRIPT, backbone, folder, rows, accumulate))],
                env=inherited | own | paths | {"OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [program.communicate(timeout=240)[1] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0] * ranks, errors[0][-3000:]
    return json.loads((folder / "logs.json").read_text()), load_file(folder / "adapter_model.safetensors")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_equal_one(tiny_backbone, tmp_path, accumulate):
    pytest.importorskip("peft", reason="needs the package peft")
    one, one_tensors = train(tiny_backbone, tmp_path / "one", 1, 1)
    two, two_tensors = train(tiny_backbone, tmp_path / "two", 2, accumulate)
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for name in ("gate_entropy", "gate_mean", "loss"):
        pairs = list(zip(one[name], two[name], strict=True))
        print(f"{name}: largest difference {max(abs(a - b) for a, b in pairs):.1e}")
        assert len(pairs) == 4
        assert all(a == pytest.approx(b, abs=1e-5) for a, b in pairs), (name, pairs)
    for name, value in one_tensors.items():
        assert torch.allclose(two_tensors[name], value, atol=1e-4), name
