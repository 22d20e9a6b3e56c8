"""The head at supervised positions only, and the loss of the next token."""

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.objectives import linear_cross_entropy
from gatera_lightning.objectives.next_token import (
    NextToken,
    head_only_at,
    shift_labels,
    shift_mask,
    summed_cross_entropy,
    summed_next_token_loss,
    supervised_logits,
)


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **FAMILIES[request.param])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()


def random_batch(share=0.4):
    torch.manual_seed(1)
    ids = torch.randint(3, 96, (3, 9))
    labels = torch.where(torch.rand(3, 9) < share, ids, IGNORE_INDEX)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_supervised_logits_match_full_logits(family):
    batch = random_batch()
    found = supervised_logits(family, batch)
    full = family(input_ids=batch["input_ids"]).logits
    assert found.positions.equal(shift_labels(batch["labels"]) != IGNORE_INDEX)
    assert found.labels.equal(batch["labels"][:, 1:][found.positions[:, :-1]])
    assert found.logits.shape == (1, len(found.labels), 96)
    assert torch.allclose(found.logits[0], full[found.positions], rtol=0, atol=1e-12)

    parameters = [p for p in family.parameters() if p.requires_grad]
    ours = torch.autograd.grad(summed_cross_entropy(found.logits, found.labels), parameters)
    labels = batch["labels"][:, 1:].flatten()
    reference = F.cross_entropy(
        full[:, :-1].flatten(0, 1), labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )
    for one, other in zip(ours, torch.autograd.grad(reference, parameters), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


def test_head_only_at_removes_its_hook(family):
    ids = torch.randint(3, 96, (1, 5))
    with pytest.raises(ZeroDivisionError), head_only_at(family, torch.zeros(1, 5, dtype=torch.bool)):
        raise ZeroDivisionError
    assert family(input_ids=ids).logits.shape == (1, 5, 96)


def test_no_supervised_tokens_give_zero_loss_and_gradient(tiny_llama):
    model, batch = tiny_llama(), random_batch(share=0)
    loss = summed_next_token_loss(model, batch)
    loss.backward()
    assert float(loss) == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("changed", ["", "head is trained", "head was replaced"])
def test_prepared_model_computes_loss_in_head(tiny_llama, changed, monkeypatch):
    """From logits before ``prepare``, and when the head is no longer what was tried."""
    model, batch, used = (
        tiny_llama().requires_grad_(False),
        random_batch() | {"step_supervised_tokens": 7},
        [],
    )
    plain = linear_cross_entropy.linear_cross_entropy
    monkeypatch.setattr(
        linear_cross_entropy, "linear_cross_entropy", lambda *args: used.append(True) or plain(*args)
    )
    before = NextToken().terms(model, batch, None)["task_loss"]
    assert not used
    NextToken().prepare(model)
    if changed == "head is trained":
        model.lm_head.weight.requires_grad_(True)
    elif changed == "head was replaced":
        model.lm_head.forward = lambda hidden: F.linear(hidden, model.lm_head.weight)
    after = NextToken().terms(model, batch, None)["task_loss"]
    assert used == ([] if changed else [True])
    assert (after.count, after.weight) == (7, 1.0)
    assert float(after.total) == pytest.approx(float(before.total), rel=1e-6)


def test_prepare_tries_a_model_once(tiny_llama, monkeypatch):
    tried = []
    monkeypatch.setattr(
        "gatera_lightning.objectives.next_token.returns_head_output",
        lambda model: tried.append(model) or True,
    )
    models = [tiny_llama(), tiny_llama()]
    for model in (*models, *models):
        NextToken().prepare(model)
    assert tried == models


def test_shift_labels_moves_labels_to_predicting_position():
    labels = torch.tensor([[IGNORE_INDEX, 7, 8], [5, IGNORE_INDEX, 6]])
    assert shift_labels(labels).tolist() == [[7, 8, IGNORE_INDEX], [IGNORE_INDEX, 6, IGNORE_INDEX]]
    assert shift_mask(labels > 0).tolist() == [[True, True, False], [False, True, False]]


def test_summed_cross_entropy_of_bf16_logits_is_in_fp32():
    logits = torch.randn(1, 5, 7).bfloat16()
    loss = summed_cross_entropy(logits, torch.arange(5))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, -F.log_softmax(logits[0].float(), -1)[range(5), range(5)].sum())
