"""Drafts of mask embeddings and a sampler head: they are those of a slow computation, and change no text."""

import pytest
import torch
from draft_folders import draft_folder
from perturbed_adapter import perturb_adapter
from transformers import DynamicCache

from gatera_lightning import AdapterConfig, ConfigError, inject_adapters, load_adapter, position_mask
from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, generate
from gatera_lightning.generation.drafting import DraftConfig, Drafter
from gatera_lightning.generation.drafting.verification import Draft, GreedyVerifier

PAD, EOS, MASKS = 0, 99, 3
PROMPTS = [
    torch.randint(3, (1 + n % 5,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(12)
]
BATCH = collate_prompts(PROMPTS, range(len(PROMPTS)), pad_id=PAD, eos_id=EOS)
DECODING = DecodingConfig(max_new_tokens=20)
SIZES = {"vocab_size": 3, "initializer_range": 1.0, "layers": 2}
"""So few tokens that random drafts are often right."""


@pytest.fixture
def build(tiny_llama):
    def plain(dtype=torch.float32):
        model = tiny_llama(dtype, **SIZES).eval()
        model.generation_config.eos_token_id = None
        return model

    return plain


def folder_for(build, folder, dtype=torch.float32):
    gate = PositionGateConfig(mask_embeddings=MASKS)
    name = str(dtype).removeprefix("torch.")
    return draft_folder(build(dtype), folder, size=0.5, gate=gate, adapter_dtype=name)


@pytest.mark.parametrize("cycle", ["one_forward", "two_forwards"])
@pytest.mark.parametrize("over", ["backbone", "adapter"])
def test_greedy_text_is_that_of_plain_decoding(build, tmp_path, over, cycle):
    model, folder = build(), folder_for(build, tmp_path / "draft")
    if over == "adapter":
        inject_adapters(model, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
        perturb_adapter(model, 0.5).eval()
    expected = generate(model, BATCH, DECODING)
    config = DraftConfig(block=MASKS + 1, cycle=cycle, only_if_faster=False)
    drafter = Drafter(model, load_draft_adapter(model, folder), config)
    assert torch.equal(drafter.generate(BATCH, DECODING), expected)
    for prompt, answer in zip(PROMPTS, expected, strict=True):
        batch = collate_prompts([prompt], [0], pad_id=PAD, eos_id=EOS)
        assert torch.equal(drafter.generate(batch, DECODING)[0], answer)
    counts = drafter.counts
    assert counts.verified.keys() == {1, 2, 3}
    assert all(0 < counts.accepted[depth] < counts.verified[depth] for depth in (1, 2, 3))


class RecordingVerifier(GreedyVerifier):
    """Keeps the logits that drafts were chosen from, and rejects no draft."""

    def __init__(self):
        self.seen = []

    def propose(self, logits):
        self.seen += [*logits]
        return [Draft(2 - token) for (token, _) in super().propose(logits)]  # other ones than the most likely


def test_drafts_are_chosen_one_after_another_from_mask_embeddings(build, tmp_path):
    """In float64, against the trained model, which gets the embeddings of one sequence."""
    folder = folder_for(build, tmp_path / "draft", torch.float64)
    model, trained = build(torch.float64), build(torch.float64)
    load_adapter(trained, folder)
    masks = trained.mask_drafts
    drafter = Drafter(model, load_draft_adapter(model, folder), DraftConfig(block=4, only_if_faster=False))
    prompts, first = [[1, 2, 0, 1], [2]], [2, 0]  # and the token that follows each prompt
    for is_joint in (False, True):
        verifier = RecordingVerifier()
        drafts = drafts_of(drafter, verifier, prompts, first, is_joint)
        for prompt, previous, found in zip(prompts, first, drafts, strict=True):
            for z, draft in zip(slow_latents(trained, prompt), found, strict=True):
                pair = torch.cat([trained.model.embed_tokens.weight[previous], z])
                hidden = torch.nn.functional.silu(masks.sampler_in @ pair + masks.sampler_in_bias)
                sampled = z + masks.sampler_out @ hidden + masks.sampler_out_bias
                expected = (trained.lm_head.weight @ sampled).detach()
                torch.testing.assert_close(verifier.seen.pop(0), expected, atol=1e-12, rtol=0)
                assert draft.token == 2 - int(expected.argmax())
                previous = draft.token
        assert verifier.seen == []


@torch.no_grad()
def slow_latents(trained, prompt):
    """What the output head receives of draft rows after a prompt, in one sequence of embeddings."""
    embeddings = torch.cat([trained.model.embed_tokens.weight[prompt], trained.mask_drafts.embeddings])
    latents, length = [], len(prompt)
    hook = trained.lm_head.register_forward_pre_hook(lambda _, args: latents.append(args[0]))
    with position_mask(trained, torch.arange(length + MASKS) >= length):
        trained(inputs_embeds=embeddings[None])
    hook.remove()
    return latents[0][0, length:]


def drafts_of(drafter, verifier, prompts, first, is_joint):
    """The drafts of the first forward pass after prompts, which is followed by given tokens."""
    passes, found = drafter._passes, []
    for batch in [list(range(len(prompts)))] if is_joint else [[0], [1]]:
        collated = collate_prompts([prompts[b] for b in batch], batch, pad_id=PAD, eos_id=EOS)
        ids = torch.cat([collated["input_ids"], torch.tensor([passes.noise_tokens(MASKS)] * len(batch))], 1)
        mask = torch.cat([collated["attention_mask"], torch.ones(len(batch), MASKS, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        inputs = {"attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            logits, outputs = passes.run(ids, rows=1 + MASKS, noise=MASKS, cache=DynamicCache(), **inputs)
            assert logits.shape == (len(batch), 1, 3)
            found += [passes.proposer.propose(verifier, outputs[i], first[b]) for i, b in enumerate(batch)]
    return found


def test_blocks_with_more_drafts_than_mask_embeddings_are_refused(build, tmp_path):
    model = build()
    adapter = load_draft_adapter(model, folder_for(build, tmp_path / "draft"))
    with pytest.raises(ConfigError, match=r"draft.block: 5, but the draft adapter has 3 mask embeddings"):
        Drafter(model, adapter, DraftConfig(block=5))
