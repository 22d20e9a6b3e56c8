"""The peak throughput of GPUs, and the memory a process uses."""

from pathlib import Path

import torch

PEAK_TFLOPS = {
    "NVIDIA A10": 125,
    "NVIDIA A30": 165,
    "NVIDIA A40": 149.7,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835,
    "NVIDIA GH200 120GB": 989,
    "NVIDIA GH200 480GB": 989,
}
"""Device name, as the driver reports it -> peak 10¹² FLOP/s in bf16 and fp16 without sparsity, from NVIDIA.

Names must match exactly: a MIG slice of a GPU has a longer name. Lightning's table mistakes an L40S for an
L4.
"""


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak 10¹² FLOP/s of a device in a dtype; None if :data:`PEAK_TFLOPS` does not contain it."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device))


def memory_bytes(device: torch.device) -> int | None:
    """Return the memory used by this process.

    Args:
        device: The device that trains.

    Returns:
        On CUDA, the peak memory of tensors since the last reset of the counter. Elsewhere, the current
        resident memory of the process (VmRSS); None on a system without ``/proc``.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)
