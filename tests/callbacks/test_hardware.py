"""Tests of the table of GPUs."""

import pytest
import torch

from gatera_lightning.callbacks.hardware import peak_tflops


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA H200", torch.float16, 989),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA A100-SXM4-80GB", torch.float32, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", torch.bfloat16, None),
        ("an unknown GPU", torch.bfloat16, None),
    ],
)
def test_peak_is_found_by_exact_device_name(monkeypatch, name, dtype, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0), dtype) == peak
