"""How a storage packs a weight: its error, its bytes, its unpacked values, against formulas of our own."""

import pytest
import torch
from packed_layers import ALL_STORAGES
from torch import nn

from gatera_lightning.adapters.packed_weight import PackedWeight, stored_bytes
from gatera_lightning.adapters.storages import STORAGES
from gatera_lightning.adapters.storages.base import Storage
from gatera_lightning.errors import ConfigError

ERRORS = {"nf4": 0.11, "nf4_double": 0.11, "quanto_int4": 0.11}
BITS = {"nf4": 4.5, "nf4_double": 4.13, "quanto_int4": 4.5}
SHAPES = [(64, 32), (5, 96), (7, 13), (130, 33), (64, 256)]
"""Rows that end inside a block of 64 are among them: bitsandbytes unpacks some of these wrongly on a CPU."""


def _weight(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def _nf4_levels():
    """The 16 levels of NF4, from the paper's appendix E."""
    negative = ["1", ".6961928", ".52507305", ".39491749", ".28444138", ".18477343", ".09105004"]
    positive = [".0795803", ".1609302", ".2461123", ".33791524", ".44070983", ".562617", ".72295684", "1"]
    return torch.tensor([*(-float(level) for level in negative), 0.0, *map(float, positive)])


def _nf4(weight):
    flat = weight.flatten().float()
    blocks = torch.cat([flat, flat.new_zeros(-len(flat) % 64)]).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales).unsqueeze(-1) - _nf4_levels()).abs().argmin(-1)
    return (_nf4_levels()[nearest] * scales).flatten()[: len(flat)].view(weight.shape)


def _int8(weight):
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    return (weight.float() / scales).round() * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_unpacked_weight_is_close_to_the_weight(storage, shape, dtype):
    if storage == "quanto_int4" and shape[0] * shape[1] % 2:
        pytest.skip("packs pairs of codes")
    weight = _weight(shape, dtype)
    found = PackedWeight.pack(weight, storage).dense()
    assert found.dtype == dtype
    assert found.shape == shape
    error = (found.double() - weight.double()).norm() / weight.double().norm()
    assert 0 < error < ERRORS.get(storage, 0.012)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("storage", "formula"), [("nf4", _nf4), ("int8", _int8)])
def test_unpacked_values_are_those_of_the_formula(storage, formula, shape):
    if STORAGES[storage].problem():
        pytest.skip(f"needs the package {STORAGES[storage].package}")
    weight = _weight(shape)
    found = PackedWeight.pack(weight, storage).dense()
    torch.testing.assert_close(found, formula(weight), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_narrow_dense_copy_is_the_float32_one_rounded_once(storage):
    packed = PackedWeight.pack(_weight((64, 256)), storage)
    assert torch.equal(packed.dense(torch.bfloat16), packed.dense(torch.float32).bfloat16())
    assert torch.equal(packed.dense(torch.float64), packed.dense(torch.float32).double())


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_stored_bytes(storage):
    packed = PackedWeight.pack(_weight((512, 1024)), storage)
    bits = 8 * stored_bytes(packed) / packed.numel()
    assert bits == pytest.approx(BITS.get(storage, 8.04), abs=0.04)
    on_meta = PackedWeight.pack(torch.empty(512, 1024, device="meta"), storage)
    assert stored_bytes(on_meta) == stored_bytes(packed)
    assert on_meta.dense().is_meta


@pytest.mark.parametrize("storage", ALL_STORAGES)
def test_row_of_zeros_stays_zero(storage):
    weight = _weight((64, 256))
    weight[3] = 0
    found = PackedWeight.pack(weight, storage).dense()
    assert torch.isfinite(found).all()
    assert not found[3].any()


@pytest.mark.parametrize(
    ("kind", "storage"), [("4bit", "nf4"), ("4bit-double", "nf4_double"), ("8bit", "int8")]
)
def test_layer_of_bitsandbytes_is_read(kind, storage):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the package bitsandbytes")
    weight = _weight((64, 256))
    if kind == "8bit":
        layer = bitsandbytes.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            256, 64, bias=False, quant_type="nf4", compress_statistics=kind == "4bit-double"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=kind == "4bit-double"
        )
    layer = layer.to("cpu")
    found = [name for name in STORAGES if STORAGES[name].read_layer(layer) is not None]
    assert found == [storage]
    packed = PackedWeight(storage, STORAGES[storage].read_layer(layer), weight.shape, torch.float32)
    if kind != "8bit":
        expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(packed.dense(), expected)
    assert (packed.dense() - weight).norm() < ERRORS.get(storage, 0.012) * weight.norm()


def test_plain_layer_is_not_read():
    assert not [name for name, storage in STORAGES.items() if storage.read_layer(nn.Linear(8, 8)) is not None]


class Missing(Storage):
    name = "missing"
    package = "no_such_package"

    def pack(self, weight):
        import no_such_package  # noqa: F401

    unpack = pack


class Wrong(type(STORAGES["int8"])):
    name = "wrong"

    def unpack(self, packed, shape, dtype):
        return super().unpack(packed, shape, dtype).roll(1, 1) + 0.3


def test_missing_package_is_named():
    assert (
        "needs the package no_such_package, which is missing: pip install 'gatera-lightning"
        in Missing().problem()
    )
    with pytest.raises(ConfigError, match=r"backbone.quantization: 'missing' needs the package no_such_pack"):
        Missing().check_backend()


def test_missing_package_inside_another_missing_one_is_named(monkeypatch):
    monkeypatch.setattr(Missing, "package", "no_such_package.part")
    assert "needs the package no_such_package.part, which is missing" in Missing().problem()


def test_broken_package_is_named(monkeypatch):
    monkeypatch.setattr(Missing, "package", "torch")
    with pytest.raises(
        ConfigError, match=r"'missing' does not work on cpu of this machine \(ModuleNotFoundError: "
    ):
        Missing().check_backend()


def test_backend_with_wrong_numbers_is_rejected():
    with pytest.raises(ConfigError, match="'wrong' gives wrong numbers on cpu of this machine"):
        Wrong().check_backend()
    STORAGES["int8"].check_backend()
