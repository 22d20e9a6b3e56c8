"""SelfDraft's form MaskEmbeddings against a slow reference: [draft rows | clean rows] in one sequence, the
sampler head written out, and plain autograd."""

import copy

import pytest
import torch
from draft_reference import SIZE, blocks_of, lora_on_first_rows, make_batch, paired_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import AdapterConfig, BackboneConfig, adapter_parameters, inject_adapters
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives import (
    MaskEmbeddings,
    RandomIds,
    SelfDraft,
    evaluate_objectives,
    training_loss,
)
from gatera_lightning.objectives import linear_cross_entropy as linear_cross_entropy_file
from gatera_lightning.objectives.draft_acceptance import acceptance
from gatera_lightning.objectives.draft_layout import DraftLayout
from gatera_lightning.objectives.mask_embeddings import _run

WEIGHT = 0.7


def reference_rows(model, parameters, scale, batch, offsets):
    """Yield (latent z, the model's own latent z_t, sampler's output, next label) of each draft row."""
    masks = {
        name.removeprefix("mask_drafts."): value
        for name, value in parameters.items()
        if name.startswith("mask_drafts.")
    }
    embed = model.get_input_embeddings()
    for row, labels in enumerate(batch["labels"]):
        length = int(batch["attention_mask"][row].sum())
        clean = batch["input_ids"][row, :length]
        blocks = blocks_of(labels, int(offsets[row]))
        depths = [column - block[0] for block in blocks for column in block]
        columns = [column for block in blocks for column in block]
        if not columns:
            continue
        n = len(columns)
        learned = torch.stack([masks["embeddings"][depth] for depth in depths])
        with lora_on_first_rows(model, parameters, scale, n):
            inputs = torch.cat([learned, embed(clean)])[None]
            latents = model.model(inputs_embeds=inputs, **paired_inputs(blocks, length)).last_hidden_state[0]
        with torch.no_grad():
            own = model.model(input_ids=clean[None], use_cache=False).last_hidden_state[0]
        for i, column in enumerate(columns):
            z = latents[i]
            pair = torch.cat([embed(clean[column]), z])
            inner = masks["sampler_in"] @ pair + masks["sampler_in_bias"]
            sampled = z + masks["sampler_out"] @ (inner * torch.sigmoid(inner)) + masks["sampler_out_bias"]
            following = int(labels[column + 1]) if column + 1 < len(labels) else IGNORE_INDEX
            yield z, own[column], sampled, following


def reference_terms(model, parameters, scale, batch, offsets):
    """The three terms, each summed over all rows; ``model`` has no adapter."""
    head = model.lm_head.weight
    base = sampler = consistency = 0.0
    for z, own, sampled, label in reference_rows(model, parameters, scale, batch, offsets):
        if label != IGNORE_INDEX:
            base = base - (head @ z).log_softmax(0)[label]
            sampler = sampler - (head @ sampled).log_softmax(0)[label]
        consistency = consistency + (own - z).square().sum() / len(z)
    return base, sampler, consistency


@pytest.fixture
def models(tiny_llama, randomize):
    """A model without an adapter, and one with a draft adapter whose values matter."""
    plain = tiny_llama(torch.float64, head_dim=8).requires_grad_(False)
    adapted = copy.deepcopy(plain)
    config = AdapterConfig(
        update="lora",
        gate=PositionGateConfig(mask_embeddings=SIZE),
        rank=4,
        alpha=6.0,
        adapter_dtype="float64",
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    )
    inject_adapters(adapted, config)
    return plain, randomize(adapted, size=0.3)


def objective(**settings):
    return SelfDraft([SIZE], form=MaskEmbeddings(consistency_weight=WEIGHT), **settings)


@pytest.mark.parametrize("per_chunk", [2**25, 5 * 128])
def test_loss_and_gradients_equal_the_reference(models, monkeypatch, per_chunk):
    plain, adapted = models
    monkeypatch.setattr(linear_cross_entropy_file, "LOGITS_PER_CHUNK", per_chunk)
    batch = make_batch()
    rows = int((batch["labels"] != IGNORE_INDEX).sum())
    scale = next(iter(adapted_linears(adapted).values())).update.scale
    for seed in range(3):  # several offsets
        torch.manual_seed(seed)
        offsets = torch.randint(SIZE, (3,))
        parameters = adapter_parameters(adapted)
        assert sum(name.startswith("mask_drafts.") for name in parameters) == 5
        torch.manual_seed(seed)
        loss = training_loss(adapted.train(), batch, objectives=[objective(weight=2.0)])
        found = torch.autograd.grad(loss, list(parameters.values()))
        copies = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        base, sampler, consistency = reference_terms(plain, copies, scale, batch, offsets)
        expected = 2 * (base + sampler + WEIGHT * consistency) / rows
        assert (loss - expected).item() == pytest.approx(0, abs=1e-10)
        for name, gradient, reference in zip(
            copies, found, torch.autograd.grad(expected, list(copies.values())), strict=True
        ):
            assert float(reference.abs().max()) > 1e-5, name
            torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0)


def test_terms_are_logged_by_name_and_the_target_has_no_gradient(models):
    plain, adapted = models
    batch = make_batch() | {"step_supervised_tokens": 40, "step_tokens": 99}
    scale = next(iter(adapted_linears(adapted).values())).update.scale
    torch.manual_seed(4)
    offsets = torch.randint(SIZE, (3,))
    torch.manual_seed(4)
    chosen = objective()
    chosen.prepare(adapted)
    found = evaluate_objectives([chosen], adapted.train(), batch)
    names = ("base_head_loss", "sampler_loss", "consistency")
    with torch.no_grad():
        expected = reference_terms(plain, dict(adapter_parameters(adapted)), scale, batch, offsets)
    assert found.weights == dict(zip(names, (1, 1, WEIGHT), strict=True))
    for name, value in zip(names, expected, strict=True):
        assert float(found.values[name]) == pytest.approx(float(value) / 40, abs=1e-10)
    rows = _run(adapted, batch, DraftLayout.of(batch["labels"], SIZE, offsets))
    assert rows.latents.requires_grad
    assert not rows.expected.requires_grad


def test_validation_measures_the_sampler_head_on_given_text(models):
    plain, adapted = models
    batch, chosen = make_batch(), objective()
    chosen.prepare(adapted)
    found = chosen.validate(adapted.eval(), batch)
    layout = DraftLayout.of(batch["labels"], SIZE, torch.zeros(3, dtype=torch.long))
    scale = next(iter(adapted_linears(adapted).values())).update.scale
    with torch.no_grad():
        parameters, offsets = dict(adapter_parameters(adapted)), torch.zeros(3)
        rows = list(reference_rows(plain, parameters, scale, batch, offsets))
        base, sampler, consistency = reference_terms(plain, parameters, scale, batch, offsets)
        drafts, own = (torch.stack([plain.lm_head(row[part]) for row in rows]).softmax(-1) for part in (2, 1))
    assert found.keys() == set(chosen.validation_names)
    assert found["loss"].count == int(found["total_variation"].count.sum()) == len(rows)
    assert float(found["loss"].total) == pytest.approx(float(base + sampler + WEIGHT * consistency))
    assert float(found["total_variation"].total.sum()) == pytest.approx(float((drafts - own).abs().sum() / 2))
    expected = acceptance(layout, drafts.argmax(1) == own.argmax(1), SIZE)
    for name, mean in expected.items():
        assert torch.equal(found[name].total, mean.total)
        assert torch.equal(found[name].count, mean.count)


def test_sampler_head_learns_what_only_the_token_before_tells(models):
    """The next token is a function of the one before it, which draft rows do not see."""
    _, adapted = models
    batch, chosen = make_batch(), SelfDraft([SIZE], form=MaskEmbeddings(0.01))
    batch |= {"step_supervised_tokens": 21, "step_tokens": 36}
    batch["labels"][:, 1:] = torch.where(
        batch["labels"][:, 1:] == IGNORE_INDEX, IGNORE_INDEX, batch["input_ids"][:, :-1] % 2
    )
    optimizer = torch.optim.AdamW(adapter_parameters(adapted).values(), lr=1e-2)
    chosen.prepare(adapted)
    torch.manual_seed(0)
    for _ in range(40):
        found = evaluate_objectives([chosen], adapted.train(), batch)
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found.values["sampler_loss"] < 0.2 * found.values["base_head_loss"]


@pytest.mark.parametrize("weight", [-1.0, float("nan"), "1", True])
def test_weight_that_cannot_work_is_rejected(weight):
    with pytest.raises(ValueError, match=r"consistency_weight is .*; accepted: a number of at least 0"):
        MaskEmbeddings(weight)
    with pytest.raises(ValueError, match=r"form is 'masks'; accepted: RandomIds or MaskEmbeddings"):
        SelfDraft(form="masks")


@pytest.mark.parametrize(
    ("form", "masks", "message"),
    [
        (MaskEmbeddings(), 0, "adapter.gate.mask_embeddings: 0, but SelfDraft with form MaskEmbeddings has"),
        (MaskEmbeddings(), 3, "has blocks of 4 rows, each of which reads one; accepted: at least 4"),
        (RandomIds(), 4, "adapter.gate.mask_embeddings: 4, but draft rows of SelfDraft hold random ids"),
        (MaskEmbeddings(), 4, None),
        (RandomIds(), 0, None),
    ],
)
def test_adapter_and_form_must_agree(form, masks, message):
    adapter = AdapterConfig(update="lora", gate=PositionGateConfig(mask_embeddings=masks))
    found = SelfDraft([2, 4], form=form).problems(adapter, BackboneConfig())
    assert len(found) == (message is not None)
    assert message is None or message in found[0]


def test_models_that_cannot_be_trained_are_refused(models):
    _, adapted = models
    del adapted.mask_drafts
    with pytest.raises(ConfigError, match=r"mask_embeddings: 0, but draft rows of SelfDraft with form Mask"):
        training_loss(adapted, make_batch(), objectives=[objective()])
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64}
    gemma = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **settings, **heads))
    config = AdapterConfig(update="lora", gate=PositionGateConfig(mask_embeddings=SIZE), rank=2)
    inject_adapters(gemma, config)
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM changes what its output head computes"):
        training_loss(gemma, make_batch(), objectives=[objective()])
