"""A short identity of frozen weights: HiRA multiplies ``W0``, so an adapter belongs to one backbone."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLES = 4096


def weight_fingerprint(weight: Tensor) -> str:
    """SHA-256 of the shape and of at least 4,096 evenly strided elements, as bfloat16.

    A base model and its instruct version differ nearly everywhere, so a sample tells them apart at no cost, while
    the same checkpoint loaded in bf16 and in fp32 keeps one identity. A weight without memory (on the meta device) has
    none yet.
    """
    if weight.is_meta:
        return ""
    flat = weight.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).cpu().view(torch.int16)
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def backbone_fingerprint(layers: Mapping[str, str]) -> str:
    """One SHA-256 over the fingerprints of the adapted layers, by name."""
    lines = "\n".join(f"{name} {layers[name]}" for name in sorted(layers))
    return hashlib.sha256(lines.encode()).hexdigest()
