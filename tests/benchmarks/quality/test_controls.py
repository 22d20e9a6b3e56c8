"""The controls compute what their names say."""

import pytest
import torch
from model_families import SIZES
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.quality.controls import (
    RandomGateConfig,
    RandomMatrixHiRA,
    ShuffledTokenGateConfig,
    shuffle_without_padding,
)
from gatera_lightning import AdapterConfig, TokenGateConfig, inject_adapters, record_gates
from gatera_lightning.adapters.lookup import adapted_linears


def _gate(config, size=6):
    return config.build(size, dtype=torch.float64, device=torch.device("cpu"))


def test_shuffled_gate_gives_the_token_gates_values_to_other_tokens():
    x = torch.randn(3, 40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, shuffled = _gate(TokenGateConfig()), _gate(ShuffledTokenGateConfig())
    with torch.no_grad():
        plain.weight.copy_(torch.arange(6.0))
    shuffled.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    expected, found = plain(x), shuffled(x)
    assert found.shape == (3, 40)
    torch.testing.assert_close(found.flatten().sort().values, expected.flatten().sort().values)
    assert (found != expected).float().mean() > 0.9
    assert not torch.equal(shuffled(x), found)  # drawn again
    assert shuffled.linear_logit() is None  # decoding must not compute the token gate instead


@torch.no_grad()
def test_shuffled_gate_takes_no_value_from_padding():
    """A left-padded prompt, then a right-padded answer with the prompt in the cache."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    inject_adapters(model, AdapterConfig(rank=2, gate=ShuffledTokenGateConfig(), target_modules=["q_proj"]))
    shuffle_without_padding(model)
    (layer, *_) = adapted_linears(model).values()  # the first: its input has seen no gate
    gate = layer.gate
    gate.weight.normal_()
    inputs = []
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    cache, seen = DynamicCache(config=model.config), torch.ones(2, 0, dtype=torch.long)
    for mask in (
        torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
        torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
    ):
        ids = torch.randint(3, 96, mask.shape) * mask
        seen = torch.cat([seen, mask], 1)
        with record_gates(model) as record:
            model(input_ids=ids, attention_mask=seen, past_key_values=cache, use_cache=True)
        own = inputs.pop() @ gate.weight + gate.bias  # each token's own logit
        found, expected = record.logits[0][mask.bool()], own[mask.bool()]
        torch.testing.assert_close(found.sort().values, expected.sort().values)
        assert not torch.allclose(found, expected)


def test_random_gate_ignores_the_input():
    torch.manual_seed(0)
    gate = _gate(RandomGateConfig(bias=0.5))
    x = torch.randn(4, 5000, 6, dtype=torch.float64)
    z = gate(x).detach()
    assert z.shape == (4, 5000)
    assert z.mean().item() == pytest.approx(0.5, abs=0.03)
    assert z.std().item() == pytest.approx(1, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([z.flatten(), x[..., 0].flatten()]))[0, 1]) < 0.03
    gate(x).sum().backward()
    assert gate.bias.grad.item() == 4 * 5000


def test_random_matrix_stands_in_for_the_weight():
    base = nn.Linear(5, 7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    update = RandomMatrixHiRA(base, rank=2, scale=1.0, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        update.b.normal_(generator=generator)
    assert update.matrix.std().item() == pytest.approx(base.weight.std().item(), rel=0.4)
    assert [name for name, _ in update.named_parameters()] == ["a", "b"]
    x = torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    delta = (update.b @ update.a) * update.matrix
    expected = torch.autograd.grad((base(x) + x @ delta.t()).square().sum(), [x, update.a, update.b])
    y = update(x, base, None, nn.Identity())
    torch.testing.assert_close(y, base(x) + update.delta(x, base))
    torch.testing.assert_close(update.delta_weight(base.weight), delta)
    found = torch.autograd.grad(y.square().sum(), [x, update.a, update.b])
    torch.testing.assert_close(found, expected)
