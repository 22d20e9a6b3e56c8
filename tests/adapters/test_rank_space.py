"""LoRA behind a threshold gate in decoding: the layer's own output, without B z of skipped tokens."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gatera_lightning import AdapterConfig
from gatera_lightning.adapters.inference import prepared_bytes, prepared_for_inference
from gatera_lightning.adapters.layer import AdaptedLinear
from gatera_lightning.adapters.rank_space import RankSpacePath

IN, OUT, RANK = 11, 9, 4
FAST = {"skip_below": 0.1, "merge_above": 0.9}


def adapted(update="lora", gate="threshold", *, tau=None, dtype=torch.float64, bias=True):
    torch.manual_seed(0)
    kind = "float64" if dtype == torch.float64 else "float32"
    config = AdapterConfig(update=update, gate=gate, rank=RANK, alpha=6.0, adapter_dtype=kind)
    layer = AdaptedLinear(nn.Linear(IN, OUT, bias=bias).to(dtype), config).eval()
    with torch.no_grad():
        layer.update.b.normal_()
    x = torch.randn(3, 5, IN, dtype=dtype)
    with torch.no_grad():
        base_out = nn.functional.linear(x, layer.base.weight)
        ratios = layer.update.delta(x, layer.base).norm(dim=-1) / base_out.norm(dim=-1)
        layer.gate.threshold.fill_(float(ratios.float().quantile(0.55)) if tau is None else tau)
    return layer, x


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("update", ["lora", "abba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_output_and_logits_are_those_of_the_layer(update, dtype, bias):
    layer, x = adapted(update, dtype=dtype, bias=bias)
    heard = []
    layer.set_gate_listener(heard.append)
    with torch.no_grad():
        expected = layer(x)
        with prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST):
            assert isinstance(layer.inference_path, RankSpacePath)
            found = layer(x)
            one = layer(x[0, 0])
    logit, fast, _ = heard
    kept = float((logit > 0).double().mean())
    assert 0.2 < kept < 0.8  # both kinds of tokens are compared
    tolerance = {"rtol": 0, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(fast, logit, **tolerance)
    decided = logit.abs() > 0.02 if dtype == torch.bfloat16 else torch.ones_like(logit, dtype=torch.bool)
    torch.testing.assert_close(found[decided], expected[decided], **tolerance)
    torch.testing.assert_close(one, found[0, 0], **tolerance)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize(("tau", "kept"), [(0.0, 15), (1e9, 0)])
def test_skipped_tokens_are_not_multiplied_by_b(tau, kept):
    layer, x = adapted(tau=tau)
    fast = prepared_for_inference(nn.ModuleDict({"one": layer}), **FAST)
    with torch.no_grad(), fast, FlopCounterMode(display=False) as counter:
        layer(x)
    every_token = 15 * 2 * (OUT * IN + IN * RANK + RANK * RANK)
    assert counter.get_total_flops() == every_token + kept * 2 * OUT * RANK


def test_path_stores_no_second_weight_and_notices_changes():
    layer, x = adapted()
    model = nn.ModuleDict({"one": layer})
    assert prepared_bytes(model, with_thresholds=True) == 0
    with torch.no_grad(), prepared_for_inference(model, **FAST):
        layer(x)
        layer.update.b.add_(1)
        with pytest.raises(RuntimeError, match="changed"):
            layer(x)


@pytest.mark.parametrize(("update", "gate"), [("dora", "threshold"), ("lora", "token")])
def test_other_methods_read_two_weights(update, gate):
    config = AdapterConfig(update=update, gate=gate, rank=RANK)
    assert not RankSpacePath.fits(AdaptedLinear(nn.Linear(IN, OUT), config))
