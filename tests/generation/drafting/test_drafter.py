"""Drafting gives the text of plain decoding, whatever the draft adapter does."""

import itertools
from functools import partial

import pytest
import torch
from draft_folders import draft_folder
from model_families import SIZES
from perturbed_adapter import perturb_adapter
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteriaList
from transformers.generation import BaseStreamer

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.adapters.draft_adapter import DraftAdapter, load_draft_adapter
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, generate
from gatera_lightning.generation.drafting import DraftConfig, Drafter
from gatera_lightning.generation.drafting.joint import JointAnswers
from gatera_lightning.generation.drafting.passes import DraftPasses
from gatera_lightning.generation.drafting.payoff import Payoff

PAD, EOS = 0, 2
PROMPTS = [
    torch.randint(3, 96, (1 + n % 17,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in range(30)
]
pytestmark = pytest.mark.usefixtures("seen_answers")
CYCLES = ["one_forward", "two_forwards"]
DECODING = DecodingConfig(max_new_tokens=24)
BATCH = collate_prompts(PROMPTS, range(len(PROMPTS)), pad_id=PAD, eos_id=EOS)


SETTINGS = {"llama": {}, "gemma2": {"head_dim": 8, "sliding_window": 8, "tie_word_embeddings": False}}


def build(family, dtype=torch.float32):
    """A tiny model whose answers vary, and often end early."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **SIZES, initializer_range=0.3, **SETTINGS[family])
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight[EOS] *= 2
            model.get_output_embeddings().weight[PAD] = 0
    return model


class SeenAnswers(JointAnswers):
    """Joint answers that a test sees while they grow."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        SeenAnswers.latest = self.answers


class InformedPasses(DraftPasses):
    """Their noise is often the text itself, for which an adapter without effect drafts the right tokens."""

    def __init__(self, drafter, *args, share):
        super().__init__(*args)
        self.drafter, self.share, self.row = drafter, share, 0
        self.random = torch.Generator().manual_seed(1)

    def noise_rows(self, *, drafts, useful):
        self.drafts = drafts
        return super().noise_rows(drafts=drafts, useful=useful)

    def noise_tokens(self, count):
        if SeenAnswers.latest is None:
            text, position = self.drafter.text, self.drafter.counts.tokens - self.drafter.start + self.drafts
        else:
            texts = self.drafter.texts
            text, position = texts[self.row], len(SeenAnswers.latest[self.row])
            self.row = (self.row + 1) % len(texts)
        known = text[position : position + count]
        right = torch.rand(count, generator=self.random) < self.share
        pairs = zip(super().noise_tokens(count), known + [EOS] * count, right, strict=False)
        return [token if is_right else noise for noise, token, is_right in pairs]


class InformedDrafter(Drafter):
    """Knows the answers, of which its drafts are often a part."""

    def __init__(self, *args, answers, share):
        super().__init__(*args)
        self._passes = InformedPasses(self, *args, share=share)
        self.texts = [[token for token in answer if token != PAD] for answer in answers.tolist()]

    def _answer(self, prompt, *args):
        self.start, SeenAnswers.latest = self.counts.tokens, None
        self.text = self.texts[PROMPTS.index(prompt)]
        return super()._answer(prompt, *args)


@pytest.fixture
def seen_answers(monkeypatch):
    """Let informed drafters see the answers of several prompts."""
    monkeypatch.setattr("gatera_lightning.generation.drafting.drafter.JointAnswers", SeenAnswers)


@pytest.fixture
def gated():
    """A backbone with a trained GateRA adapter."""
    model = build("llama")
    inject_adapters(model, AdapterConfig(rank=4), torch.Generator().manual_seed(0))
    return perturb_adapter(model, 0.5).eval()


@pytest.fixture
def adapter_for(tmp_path):
    """``adapter_for(model, "llama", size=0.3)``: a random draft adapter."""

    def load(model, family="llama", size=0.3):
        return load_draft_adapter(
            model, draft_folder(build(family, model.dtype), tmp_path / f"draft-{size}", size=size)
        )

    return load


def config(cycle="one_forward", **settings):
    return DraftConfig(cycle=cycle, only_if_faster=False, **settings)


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float32), ("llama", torch.float64), ("gemma2", torch.float32)]
)
def test_greedy_text_is_that_of_plain_decoding(adapter_for, family, dtype, cycle):
    check_text(build(family, dtype), partial(adapter_for, family=family), cycle)


@pytest.mark.parametrize("cycle", CYCLES)
def test_greedy_text_of_an_adapted_model_is_that_of_plain_decoding(adapter_for, gated, cycle):
    check_text(gated, adapter_for, cycle)


def check_text(model, adapter_for, cycle):
    """Compare the answers of a random draft adapter and of an informed one with plain decoding's."""
    expected = generate(model, BATCH, DECODING)
    lengths = (expected != PAD).sum(1)
    assert len(lengths.unique()) > 5  # some end early
    drafter = Drafter(model, adapter_for(model), config(cycle))
    assert torch.equal(drafter.generate(BATCH, DECODING), expected)
    assert drafter.counts.tokens == lengths.sum()
    for is_joint in (False, True):
        drafter = InformedDrafter(
            model, adapter_for(model, size=1e-9), config(cycle), answers=expected, share=0.7
        )
        found = drafter.generate(BATCH, DECODING).tolist() if is_joint else one_by_one(drafter)
        assert [[token for token in answer if token != PAD] for answer in found] == drafter.texts
        counts = drafter.counts
        assert counts.tokens == lengths.sum()
        assert counts.verified.keys() == {1, 2, 3}
        assert all(0 < counts.accepted[depth] < counts.verified[depth] for depth in (1, 2, 3))
        assert counts.tokens_per_forward > 1


def one_by_one(drafter, **settings):
    batches = [collate_prompts([prompt], [0], pad_id=PAD, eos_id=EOS) for prompt in PROMPTS]
    return [drafter.generate(batch, DECODING, **settings)[0].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("cycle", "tokens"), [("one_forward", 1 + 4 + 4 + 4), ("two_forwards", 1 + 4 + 1 + 4)]
)
def test_tokens_of_four_forward_passes_if_all_drafts_are_right(adapter_for, gated, cycle, tokens):
    decoding = DecodingConfig(max_new_tokens=tokens)
    expected = generate(gated, BATCH, decoding)
    longest = int((expected != PAD).sum(1).argmax())
    assert (expected[longest] != PAD).all()
    batch = collate_prompts([PROMPTS[longest]], [0], pad_id=PAD, eos_id=EOS)
    drafter = InformedDrafter(
        gated, adapter_for(gated, size=1e-9), config(cycle), answers=expected, share=1.0
    )
    assert torch.equal(drafter.generate(batch, decoding)[0], expected[longest])
    assert drafter.counts.forwards == 4
    assert set(drafter.counts.acceptance().values()) == {1.0}


def test_greedy_text_of_a_model_with_a_larger_vocabulary_is_that_of_plain_decoding(adapter_for):
    """A draft adapter has no vocabulary: the model's own head chooses the drafts."""
    model = build("llama", torch.float64)  # in float32, one of the answers has two equally likely tokens
    adapter = adapter_for(model)
    model.resize_token_embeddings(SIZES["vocab_size"] + 24, mean_resizing=False)
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[-24:] = 2 * weight[10:34]  # the new tokens are chosen, too
    expected = generate(model, BATCH, DECODING)
    assert int(expected.max()) >= SIZES["vocab_size"]
    assert torch.equal(Drafter(model, adapter, config()).generate(BATCH, DECODING), expected)


@pytest.mark.parametrize("cycle", CYCLES)
def test_stopping_criteria_end_an_answer_among_accepted_drafts(adapter_for, gated, cycle):
    def divides(ids, scores):
        return ids[:, -1] % 5 == 0

    expected = generate(gated, BATCH, DECODING)
    drafter = InformedDrafter(
        gated, adapter_for(gated, size=1e-9), config(cycle), answers=expected, share=0.9
    )
    found = one_by_one(drafter, stopping=StoppingCriteriaList([divides]))
    ends = [
        next((end for end, token in enumerate(text, 1) if token % 5 == 0), len(text))
        for text in drafter.texts
    ]
    assert found == [text[:end] for text, end in zip(drafter.texts, ends, strict=True)]
    assert sum(ends) < sum(map(len, drafter.texts))
    assert drafter.counts.tokens == sum(ends)


@pytest.mark.parametrize("is_joint", [False, True])
def test_drafts_are_turned_off_if_they_do_not_pay(adapter_for, gated, is_joint):
    seconds = (number**2 for number in itertools.count())  # every pass takes longer than the ones before
    drafter = Drafter(gated, adapter_for(gated), DraftConfig(), lambda: Payoff(lambda: next(seconds)))
    expected = [[t for t in answer if t != PAD] for answer in generate(gated, BATCH, DECODING).tolist()]

    def answers():
        found = drafter.generate(BATCH, DECODING).tolist() if is_joint else one_by_one(drafter)
        return [[token for token in answer if token != PAD] for answer in found]

    assert drafter.turned_off == []
    assert answers() == expected
    (verdict,) = drafter.turned_off
    assert "drafts turned off: a forward pass with drafts gave 1" in verdict
    assert verdict.endswith("without, with 30 prompts per pass" if is_joint else "without")
    before = drafter.counts.forwards
    assert answers() == expected
    assert drafter.counts.forwards - before == sum(map(len, expected))
    one = collate_prompts([[5, 6, 7]], [0], pad_id=PAD, eos_id=EOS)
    drafter.generate(one, DECODING)  # another number of prompts does not hide the verdict
    assert verdict in drafter.turned_off


def test_streamer_receives_what_plain_decoding_sends(adapter_for, gated):
    class Recorder(BaseStreamer):
        def __init__(self):
            self.received = []

        def put(self, value):
            self.received += value.flatten().tolist()

        def end(self):
            self.received.append("end")

    batch = collate_prompts([PROMPTS[3]], [0], pad_id=PAD, eos_id=EOS)
    plain, drafted = Recorder(), Recorder()
    generate(gated, batch, DECODING, streamer=plain)
    Drafter(gated, adapter_for(gated), config()).generate(batch, DECODING, streamer=drafted)
    assert drafted.received == plain.received


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 72}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    ],
)
def test_prompts_with_learned_positions_and_with_alibi(family, settings):
    """OPT has just as many positions as a prompt and its answer; MPT counts hidden columns of the cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = AutoConfig.for_model(family, **(SIZES | settings))
        model = AutoModelForCausalLM.from_config(sizes, dtype=torch.float64).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    prompts = [
        torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(8)
    ]
    batch = collate_prompts(prompts, range(8), pad_id=PAD, eos_id=EOS)
    decoding = DecodingConfig(max_new_tokens=60)
    no_layers = DraftAdapter(model, {}, {}, AdapterConfig(update="lora", gate="position", rank=4))
    drafter = Drafter(model, no_layers, config("two_forwards"))
    assert torch.equal(drafter.generate(batch, decoding), generate(model, batch, decoding))
    assert drafter.counts.forwards < drafter.counts.tokens  # some drafts were accepted


@pytest.mark.parametrize("prompts", [1, 2])
def test_drafts_after_the_end_of_an_answer_are_not_counted(adapter_for, gated, prompts):
    """All drafts are right; the second one of the second block ends the answer."""
    expected = generate(gated, BATCH, DECODING)
    row = next(row for row, answer in enumerate(expected) if len(set(answer[:8].tolist())) == 8)
    gated.generation_config.eos_token_id = int(expected[row, 6])
    batch = collate_prompts([PROMPTS[row]] * prompts, range(prompts), pad_id=PAD, eos_id=EOS)
    drafter = InformedDrafter(
        gated, adapter_for(gated, size=1e-9), config("two_forwards"), answers=expected, share=1.0
    )
    if prompts > 1:
        drafter.texts = [drafter.texts[row]] * prompts
    assert torch.equal(drafter.generate(batch, DECODING), expected[[row] * prompts, :7])
    # The prompt gives a token, the first block 4, then the model a token, and the second block one more.
    assert drafter.counts.forwards == 4 * prompts
    assert drafter.counts.tokens == 7 * prompts
    assert drafter.counts.verified == drafter.counts.accepted
    assert drafter.counts.verified == {1: 2 * prompts, 2: prompts, 3: prompts}
