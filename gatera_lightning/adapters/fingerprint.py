"""Fingerprints of frozen weights, because an adapter fits only the backbone it was trained on."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_SAMPLES = 4096


def weight_fingerprint(weight: Tensor) -> str:
    """Return the SHA-256 of a weight's shape and of at least 4,096 evenly strided elements, as bfloat16.

    A base model and its instruct version differ nearly everywhere, so a sample distinguishes them cheaply.
    One checkpoint has the same fingerprint whether it is loaded in bfloat16 or float32.

    Args:
        weight: A weight, (out, in).

    Returns:
        The hexadecimal digest; empty for a weight on the meta device, which has no values.
    """
    if weight.is_meta:
        return ""
    flat = weight.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.bfloat16).cpu().view(torch.int16)
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def backbone_fingerprint(layers: Mapping[str, str]) -> str:
    """Return one SHA-256 over the fingerprints of the adapted layers, given by layer name."""
    lines = "\n".join(f"{name} {layers[name]}" for name in sorted(layers))
    return hashlib.sha256(lines.encode()).hexdigest()
