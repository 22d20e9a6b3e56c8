"""The machine that a benchmark runs on: its name, its clocks and its memory."""

import ctypes
import platform
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def describe_machine() -> str:
    """Return the name of the GPU, or of the processor, and the version of PyTorch."""
    if DEVICE == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{next(names, platform.machine())}, one thread, {capability}, torch {torch.__version__}"


def synchronize() -> None:
    """Wait until the GPU has finished; does nothing on a CPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Let :func:`peak_memory` start from the memory that is in use now."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak in bytes: what CUDA allocated, or the largest resident set of this process (Linux)."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
