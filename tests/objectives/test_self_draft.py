"""SelfDraft against a slow reference: [draft rows | clean rows] in one sequence, a mask built by loops, and
plain autograd."""

import copy

import pytest
import torch
from draft_reference import SIZE, VOCABULARY, blocks_of, lora_on_first_rows, make_batch, paired_inputs

from gatera_lightning import AdapterConfig, BackboneConfig, adapter_parameters, inject_adapters
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.errors import ConfigError
from gatera_lightning.objectives import SelfDraft, training_loss
from gatera_lightning.objectives import self_draft as self_draft_file
from gatera_lightning.objectives import total_variation as total_variation_file
from gatera_lightning.objectives.draft_forward import compared_predictions
from gatera_lightning.objectives.draft_layout import DraftLayout


def reference_loss(model, factors, scale, batch, noise, offsets):
    """Sum of ½ Σ |p − q| over draft rows, one sequence at a time; ``model`` has no adapter."""
    total = 0.0
    for row, labels in enumerate(batch["labels"]):
        length = int(batch["attention_mask"][row].sum())
        clean = batch["input_ids"][row, :length]
        blocks = blocks_of(labels, int(offsets[row]))
        columns = [column for block in blocks for column in block]
        n = len(columns)
        if not n:
            continue
        with lora_on_first_rows(model, factors, scale, n):
            ids = torch.cat([noise[row, :n], clean])[None]
            logits = model(input_ids=ids, **paired_inputs(blocks, length)).logits[0]
        with torch.no_grad():
            teacher = model(input_ids=clean[None], use_cache=False).logits[0, columns]
        total = total + (logits[:n].softmax(-1) - teacher.softmax(-1)).abs().sum() / 2
    return total


@pytest.fixture
def models(tiny_llama, randomize):
    """A model without an adapter, and one with a draft adapter whose values matter."""
    plain = tiny_llama(torch.float64, head_dim=8).requires_grad_(False)
    adapted = copy.deepcopy(plain)
    config = AdapterConfig(
        update="lora",
        gate="position",
        rank=4,
        alpha=6.0,
        adapter_dtype="float64",
        target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    )
    inject_adapters(adapted, config)
    return plain, randomize(adapted, size=0.3)


def drawn(objective, batch):
    """The offsets and the random ids that the objective draws next; the generator is set back."""
    state = torch.get_rng_state()
    offsets = torch.randint(SIZE, (len(batch["labels"]),))
    rows = int((batch["labels"] != IGNORE_INDEX).sum(1).max())
    noise = torch.randint(VOCABULARY, (len(batch["labels"]), rows))
    torch.set_rng_state(state)
    return offsets, noise


@pytest.mark.parametrize(
    ("in_head", "per_chunk"), [(True, 2**24), (True, 5 * VOCABULARY), (False, 2**24)], ids=str
)
def test_loss_and_gradients_equal_the_reference(models, monkeypatch, in_head, per_chunk):
    plain, adapted = models
    monkeypatch.setattr(self_draft_file, "_head_compares", lambda _: in_head)
    monkeypatch.setattr(total_variation_file, "LOGITS_PER_CHUNK", per_chunk)
    batch, objective = make_batch(), SelfDraft([SIZE])
    for seed in range(3):  # several offsets
        torch.manual_seed(seed)
        offsets, noise = drawn(objective, batch)
        parameters = adapter_parameters(adapted)
        loss = training_loss(adapted.train(), batch, objectives=[objective])
        found = torch.autograd.grad(loss, list(parameters.values()))
        factors = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        scale = next(iter(adapted_linears(adapted).values())).update.scale
        rows = int((batch["labels"] != IGNORE_INDEX).sum())
        expected = 2 * reference_loss(plain, factors, scale, batch, noise, offsets) / rows
        assert (loss - expected).item() == pytest.approx(0, abs=1e-10)
        for gradient, reference in zip(
            found, torch.autograd.grad(expected, list(factors.values())), strict=True
        ):
            assert float(reference.abs().max()) > 1e-5
            torch.testing.assert_close(gradient, reference, atol=1e-10, rtol=0)


def test_perturbed_tokens_reach_only_rows_that_may_see_them(models):
    _, adapted = models
    adapted.eval()
    batch = make_batch()
    layout = DraftLayout.of(batch["labels"], SIZE, torch.tensor([0, 0, 0]))
    noise = torch.randint(VOCABULARY, layout.columns.shape, generator=torch.Generator().manual_seed(2))

    def compared(batch, noise):
        found = torch.full(layout.columns.shape, torch.nan, dtype=torch.float64)
        values = compared_predictions(adapted, batch, layout, noise, in_head=False)[:, 0]
        return found.masked_scatter(layout.is_draft, values)

    before = compared(batch, noise)
    # Sequence 1: the blocks of columns 1-3, 4, 7-9 and 10-11 are the rows 0-2, 3, 4-6 and 7-8.
    other = noise.clone()
    other[1, 5] = (other[1, 5] + 1) % VOCABULARY  # the second row of block 7-9
    assert ((compared(batch, other) - before).abs() > 1e-12).nonzero().tolist() == [[1, 5], [1, 6]]
    clean = batch["input_ids"].clone()
    clean[0, 9:] = 7  # padding
    assert torch.equal(compared(batch | {"input_ids": clean}, noise).nan_to_num(), before.nan_to_num())
    clean[1, 8] = (clean[1, 8] + 1) % VOCABULARY  # what row 4, at column 7, predicts
    changed = (compared(batch | {"input_ids": clean}, noise) - before).abs() > 1e-12
    # Rows 5 and 6 see the change in the target, rows 7 and 8 also in what they attend to.
    assert changed.nonzero().tolist() == [[1, 5], [1, 6], [1, 7], [1, 8]]


def test_block_size_follows_the_step():
    objective = SelfDraft([2, 4, 8], steps_per_size=3)
    sizes = []
    for step in range(10):
        objective.begin_step(step)
        sizes.append(objective.block_size)
    assert sizes == [2, 2, 2, 4, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_sizes": []}, r"block_sizes is \[\]; accepted: a list of integers of at least 1"),
        ({"block_sizes": 4}, "block_sizes is 4; accepted: a list"),
        ({"block_sizes": [4, 0]}, r"block_sizes is \[4, 0\]"),
        ({"block_sizes": [4, 2]}, "accepted: .* each larger than the one before"),
        ({"block_sizes": [4], "steps_per_size": 9}, "steps_per_size is 9, but block_sizes .* accepted: null"),
        ({"steps_per_size": 0}, "steps_per_size is 0; accepted: an integer of at least 1"),
        ({"weight": float("nan")}, "weight is nan; accepted: a number above 0"),
    ],
)
def test_settings_that_cannot_work_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfDraft(**settings)


def test_packed_batch_and_wrong_settings_of_the_model_are_rejected(models):
    batch = make_batch() | {"position_ids": torch.zeros(3, 12, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"the batch is packed; accepted: data\.packing false"):
        training_loss(models[1], batch, objectives=[SelfDraft()])
    gate, checkpointing = SelfDraft().problems(
        AdapterConfig(gate="token"), BackboneConfig(gradient_checkpointing=True)
    )
    assert gate.startswith(
        "adapter.gate: 'token', but SelfDraft trains an adapter that acts on draft rows only"
    )
    assert checkpointing.startswith("backbone.gradient_checkpointing: true, but draft rows attend to cached")


def test_model_that_ignores_the_mask_is_rejected(models, monkeypatch):
    _, adapted = models
    SelfDraft().prepare(adapted)
    broken = copy.deepcopy(adapted)
    visible = DraftLayout.attention_mask
    monkeypatch.setattr(DraftLayout, "attention_mask", lambda *args: torch.zeros_like(visible(*args)))
    with pytest.raises(ConfigError, match="draft rows of LlamaForCausalLM do not see the same in training"):
        SelfDraft().prepare(broken)


def test_sequence_longer_than_a_sliding_window_is_rejected(models):
    models[1].config.sliding_window = 8
    with pytest.raises(ConfigError, match="12 tokens, and LlamaForCausalLM has sliding windows of 8"):
        training_loss(models[1], make_batch(), objectives=[SelfDraft()])


def test_frozen_model_is_learned(models):
    """A draft of one row that sees the seed can learn what the model says of a constant sequence."""
    _, adapted = models
    batch = make_batch()
    batch["input_ids"][:] = 5
    objective = SelfDraft([1])
    optimizer = torch.optim.AdamW(adapter_parameters(adapted).values(), lr=1e-2)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        loss = training_loss(adapted.train(), batch, objectives=[objective])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
