"""SelfDraft over a trained adapter, against a slow reference: one plain causal forward pass per block."""

import pytest
import torch
from draft_reference import SIZE, VOCABULARY, blocks_of

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters, save_adapter
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.frozen_adapter import load_frozen_adapter
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.adapters.lookup import adapted_linears
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, generate
from gatera_lightning.generation.drafting import DraftConfig, Drafter
from gatera_lightning.generation.drafting.passes import DraftPasses
from gatera_lightning.objectives import SelfDraft, training_loss

TUNED = {
    "gatera": {"update": "hira", "gate": "token", "target_modules": ["q_proj", "k_proj", "down_proj"]},
    "lora": {"update": "lora", "gate": "token", "target_modules": ["v_proj", "gate_proj"]},
    "dora": {"update": "dora", "gate": "none", "target_modules": ["q_proj", "o_proj"]},
    "hard": {"update": "hira", "gate": "hard", "dropout": 0.5, "target_modules": ["q_proj", "up_proj"]},
    "threshold": {"update": "lora", "gate": "threshold", "target_modules": ["q_proj", "up_proj"]},
}
DRAFT = AdapterConfig(
    update="lora",
    gate="position",
    rank=4,
    alpha=6.0,
    adapter_dtype="float64",
    target_modules=["q_proj", "v_proj", "down_proj"],
)


def make_batch():
    """Two sequences: a padded one, and one with a gap between its responses."""
    ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 9:] = 0
    labels[0, 9:] = labels[0, :4] = labels[1, :1] = labels[1, 5:7] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def tuned(tiny_llama, randomize, tmp_path):
    """The folder of a trained adapter, and the model with it, loaded as for decoding."""

    def build(method):
        model = tiny_llama(torch.float64, head_dim=8)
        inject_adapters(model, AdapterConfig(rank=3, adapter_dtype="float64", **TUNED[method]))
        save_adapter(randomize(model), tmp_path / "tuned")
        model = tiny_llama(torch.float64, head_dim=8)
        load_adapter(model, tmp_path / "tuned")
        return tmp_path / "tuned", model.eval().requires_grad_(False)

    return build


def with_draft(tiny_llama, randomize, folder, size=0.3):
    """A model of which the adapter in a folder is part, with a draft adapter whose values matter."""
    model = tiny_llama(torch.float64, head_dim=8)
    load_frozen_adapter(model, folder)
    inject_adapters(model, DRAFT)
    return randomize(model, size=size).train()


def dense_gatera(layer):
    """W0 x + σ(w·x + b) · (W0 ⊙ BA) x, as a hook of a plain linear layer."""
    update, gate = layer.update, layer.gate
    weight = layer.base.weight * (update.b @ update.a)
    return lambda _, x, y: y + torch.sigmoid(x[0] @ gate.weight + gate.bias).unsqueeze(-1) * (x[0] @ weight.T)


def reference_loss(model, factors, scale, batch, noise, offsets):
    """Sum of Σ |p − q| over draft rows: block by block, behind the tokens before it."""
    total, modules = 0.0, dict(model.named_modules())
    for row, labels in enumerate(batch["labels"]):
        drawn = iter(noise[row])
        for block in blocks_of(labels, int(offsets[row])):
            text = batch["input_ids"][row]
            ids = torch.cat([text[: block[0]], torch.stack([next(drawn) for _ in block])])
            drafts = (torch.arange(len(ids)) >= block[0]).double().view(1, -1, 1)

            def add(x, y, name, drafts=drafts):
                a, b = factors[f"{name}.update.a"], factors[f"{name}.update.b"]
                return y + drafts * scale * (x @ a.T @ b.T)

            hooks = [
                modules[name].register_forward_hook(lambda _, x, y, name=name, add=add: add(x[0], y, name))
                for name in modules
                if f"{name}.update.a" in factors
            ]
            drafted = model(input_ids=ids[None], use_cache=False).logits[0, block].softmax(-1)
            for hook in hooks:
                hook.remove()
            with torch.no_grad():
                teacher = model(input_ids=text[None, : block[-1] + 1], use_cache=False).logits[0, block]
            total = total + (drafted - teacher.softmax(-1)).abs().sum()
    return total


def drawn(batch):
    """The offsets and the random ids that the objective draws next; the generator is set back."""
    state = torch.get_rng_state()
    offsets = torch.randint(SIZE, (len(batch["labels"]),))
    rows = int((batch["labels"] != IGNORE_INDEX).sum(1).max())
    noise = torch.randint(VOCABULARY, (len(batch["labels"]), rows))
    torch.set_rng_state(state)
    return offsets, noise


@pytest.mark.parametrize("method", TUNED)
def test_loss_and_gradients_equal_the_reference(tiny_llama, randomize, tuned, method):
    folder, reference = tuned(method)
    if method == "gatera":
        plain = tiny_llama(torch.float64, head_dim=8).requires_grad_(False)
        for name, layer in adapted_linears(reference).items():
            plain.get_submodule(name).register_forward_hook(dense_gatera(layer))
        reference = plain
    model, batch = with_draft(tiny_llama, randomize, folder), make_batch()
    parameters = adapter_parameters(model)
    assert {name.rpartition(".update.")[0].rpartition(".")[2] for name in parameters} == set(
        DRAFT.target_modules
    )
    for seed in range(3):  # several offsets
        torch.manual_seed(seed)
        offsets, noise = drawn(batch)
        loss = training_loss(model, batch, objectives=[SelfDraft([SIZE])])
        found = torch.autograd.grad(loss, list(parameters.values()))
        factors = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        scale = DRAFT.alpha / DRAFT.rank
        rows = int((batch["labels"] != IGNORE_INDEX).sum())
        expected = reference_loss(reference, factors, scale, batch, noise, offsets) / rows
        assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
        gradients = torch.autograd.grad(expected, list(factors.values()))
        for gradient, wanted in zip(found, gradients, strict=True):
            assert float(wanted.abs().max()) > 1e-5
            torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=0)


class RecordingPasses(DraftPasses):
    """Noise that depends on the position in the text only; records where blocks of drafts begin."""

    def noise_tokens(self, count):
        start = self.prompt + self.counts.tokens
        if count:
            self.blocks.append((start, count))
        return self.noise[start : start + count]


def test_acceptance_in_validation_is_that_of_greedy_decoding(
    tiny_llama, randomize, tuned, tmp_path, monkeypatch
):
    folder, model = tuned("gatera")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    prompt, size = list(range(3, 12)), 4
    batch = collate_prompts([prompt], [0], pad_id=0, eos_id=VOCABULARY + 1)
    decoding = DecodingConfig(max_new_tokens=60)
    answer = generate(model, batch, decoding)[0].tolist()
    assert len(set(answer)) > 8
    text = torch.tensor(prompt + answer)
    # Drafts are accepted if the noise is the text itself, and the draft adapter does little.
    generator = torch.Generator().manual_seed(0)
    is_right = torch.rand(len(text), generator=generator) < 0.7
    noise = torch.where(is_right, text, torch.randint(VOCABULARY, text.shape, generator=generator))

    trained = with_draft(tiny_llama, randomize, folder, size=0.03).eval()
    with torch.no_grad():
        trained.get_output_embeddings().weight.mul_(30)
    save_adapter(trained, tmp_path / "draft")
    settings = DraftConfig(block=size + 1, only_if_faster=False)
    adapter = load_draft_adapter(model, tmp_path / "draft")
    drafter, passes = Drafter(model, adapter, settings), RecordingPasses(model, adapter, settings)
    passes.prompt, passes.counts, passes.noise, passes.blocks = (
        len(prompt),
        drafter.counts,
        noise.tolist(),
        [],
    )
    drafter._passes = passes
    assert drafter.generate(batch, decoding)[0].tolist() == answer

    labels = torch.full((len(passes.blocks), len(text)), IGNORE_INDEX)
    drawn = torch.zeros(len(passes.blocks), size, dtype=torch.long)
    for row, ids, (start, count) in zip(labels, drawn, passes.blocks, strict=True):
        row[start : start + count] = text[start : start + count]
        ids[:count] = noise[start : start + count]
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    ids = text.expand(labels.shape)
    found = SelfDraft([size]).validate(
        trained, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    )
    for depth in range(1, size + 1):
        mean = found[f"acceptance_{depth}"]
        assert (int(mean.total.sum()), int(mean.count.sum())) == (
            drafter.counts.accepted[depth],
            drafter.counts.verified[depth],
        )
    assert 0 < drafter.counts.accepted[2] < drafter.counts.accepted[1] < drafter.counts.verified[1]
