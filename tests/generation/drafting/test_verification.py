"""Verified drafts are distributed as the tokens that plain decoding chooses."""

import pytest
import torch
from draft_folders import draft_folder

from gatera_lightning.adapters.draft_adapter import load_draft_adapter
from gatera_lightning.adapters.gates import PositionGateConfig
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, Sampling
from gatera_lightning.generation.drafting import DraftConfig, Drafter
from gatera_lightning.generation.drafting.verification import Draft, GreedyVerifier, SamplingVerifier

LOGITS = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0], [0.0, 1.0, 2.0]])  # most likely: 1, 0, 2


@pytest.mark.parametrize(
    ("drafts", "verdict"), [((1, 0), (2, 2)), ((1, 2), (1, 0)), ((0, 0), (0, 1)), ((), (0, 1))]
)
def test_greedy_verdict_is_the_longest_equal_prefix_and_a_correction(drafts, verdict):
    assert GreedyVerifier().verify(LOGITS[: len(drafts) + 1], [Draft(t) for t in drafts]) == verdict
    assert [draft.token for draft in GreedyVerifier().propose(LOGITS)] == [1, 0, 2]


def test_sampled_tokens_of_one_draft_have_the_models_distribution():
    """Whatever q is: here it even excludes a token that the model may choose."""
    torch.manual_seed(0)
    verifier, counts = SamplingVerifier(Sampling(temperature=0.7)), torch.zeros(3)
    q = torch.tensor([0.9, 0.0, 0.1])
    for _ in range(4000):
        token = int(torch.multinomial(q, 1))
        verdict = verifier.verify(LOGITS[:2], [Draft(token, q)])
        counts[token if verdict.accepted else verdict.token] += 1
    p = (LOGITS[0] / 0.7).softmax(0)
    check_distribution(counts, p)
    with pytest.raises(AssertionError):
        check_distribution(counts, q)


def test_draft_with_the_models_own_distribution_is_always_accepted():
    verifier = SamplingVerifier(Sampling(temperature=1.3, top_p=0.8))
    drafts = verifier.propose(LOGITS)
    assert all(verifier.verify(LOGITS, drafts[:2]).accepted == 2 for _ in range(50))
    assert float(drafts[1].probabilities.min()) == 0  # top_p


def check_distribution(counts, probabilities):
    """Pearson's chi-square test at 0.0001; cells of which less than five are expected are one cell."""
    expected, rare = counts.sum() * probabilities, counts.sum() * probabilities < 5
    seen, expected = (
        torch.cat([cells[~rare], cells[rare].sum(0, keepdim=True)[: int(rare.any())]])
        for cells in (counts, expected)
    )
    statistic, degrees = float(((seen - expected).square() / expected).sum()), len(seen) - 1
    spread = 2 / (9 * degrees)  # Wilson and Hilferty's approximation of the quantile
    assert statistic < degrees * (1 - spread + 3.72 * spread**0.5) ** 3, (statistic, degrees)


@pytest.mark.parametrize(
    "draws", [500, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("cycle", ["one_forward", "two_forwards"])
@pytest.mark.parametrize("masks", [0, 3], ids=["random_ids", "mask_embeddings"])
def test_sampled_texts_have_the_distribution_of_plain_sampling(tiny_llama, tmp_path, cycle, draws, masks):
    """All texts of five tokens from a vocabulary of three: 243 cells, which cover every depth."""
    sizes = {"vocab_size": 3, "initializer_range": 0.5, "layers": 1}
    model = tiny_llama(**sizes).eval()
    model.generation_config.eos_token_id = None
    gate = PositionGateConfig(mask_embeddings=masks)
    adapter = load_draft_adapter(model, draft_folder(tiny_llama(**sizes), tmp_path / "draft", gate=gate))
    drafter = Drafter(model, adapter, DraftConfig(cycle=cycle, only_if_faster=False))
    width = 50 if cycle == "two_forwards" else 1  # only this cycle shares passes
    batch = collate_prompts([[1, 2]] * width, range(width), pad_id=0, eos_id=99)
    decoding, sampling = DecodingConfig(max_new_tokens=5), Sampling(temperature=1.5)
    torch.manual_seed(0)
    counts = torch.zeros(3, 3, 3, 3, 3)
    for _ in range(draws // width):
        for text in drafter.generate(batch, decoding, sampling=sampling).tolist():
            counts[tuple(text)] += 1
    assert drafter.counts.accepted.keys() == {1, 2, 3}

    texts = torch.cartesian_prod(*[torch.arange(3)] * 5)
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor([[1, 2]]).expand(243, 2), texts], 1)).logits[:, 1:-1] / 1.5
    p = logits.log_softmax(-1).gather(2, texts.unsqueeze(2)).sum((1, 2)).exp()
    counts = counts.flatten()
    check_distribution(counts, p)
    for place in range(5):
        cells = [texts[:, place] == token for token in range(3)]
        check_distribution(*(torch.stack([x[cell].sum() for cell in cells]) for x in (counts, p)))
