"""Fingerprints of frozen weights, because an adapter fits only the backbone it was trained on.

Version 1, of adapter folders and checkpoints up to format 2, samples a weight with a fixed stride, which sees
one column of a matrix whose width the stride is a multiple of. Version 2 sees every column. Both round to
bfloat16. Version 3 rounds the elements of version 2 to float16 instead, so that a backbone has it in common
with its copy in float16.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gatera_lightning.adapters.packed_weight import PackedWeight

_SAMPLES = 4096


class WeightFingerprint(NamedTuple):
    """The fingerprints of one weight; all empty for a weight on the meta device, which has no values."""

    version_1: str
    version_2: str
    version_3: str = ""


def weight_fingerprint(weight: Tensor) -> WeightFingerprint:
    """Return the SHA-256 of a weight's shape and of at least 4,096 evenly strided elements, rounded.

    A base model and its instruct version differ nearly everywhere, so a sample distinguishes them cheaply.
    One checkpoint has the same fingerprint whether it is loaded in bfloat16 or float32, and whether it is
    quantized while it is loaded. A weight that has only been seen quantized has that of its dense values.

    Args:
        weight: A weight, (out, in).
    """
    if weight.is_meta:
        return WeightFingerprint("", "")
    if isinstance(weight, PackedWeight):
        return weight.fingerprint or weight_fingerprint(weight.dense(torch.float32))
    flat = weight.detach().flatten()
    first = flat[:: max(1, flat.numel() // _SAMPLES)]
    sample = flat[:: _stride_over_all_columns(flat.numel(), weight.shape[-1])]
    return WeightFingerprint(
        _digest(weight, first.to(torch.bfloat16)),
        _digest(weight, sample.to(torch.bfloat16)),
        _digest(weight, sample.to(torch.float16)),
    )


def backbone_fingerprint(layers: Mapping[str, WeightFingerprint], version: int = 2) -> str:
    """Return one SHA-256 over the fingerprints of the adapted layers, given by layer name.

    The text of version 2 starts with ``2:``, and so on; :func:`fingerprint_version` reads it.
    """
    lines = "\n".join(f"{name} {layers[name][version - 1]}" for name in sorted(layers))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return digest if version == 1 else f"{version}:{digest}"


def fingerprint_version(fingerprint: str) -> int:
    """Return the version of a stored fingerprint of a backbone: 1, 2 or 3."""
    version = fingerprint.partition(":")[0]
    return int(version) if version in ("2", "3") else 1


def _stride_over_all_columns(elements: int, width: int) -> int:
    """Return a stride that visits every column: coprime to the width, with at least that many samples."""
    stride = max(1, elements // max(_SAMPLES, width))
    while math.gcd(stride, width) > 1:
        stride -= 1
    return stride


def _digest(weight: Tensor, sample: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
