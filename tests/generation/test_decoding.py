"""Decoding: batched, padded and cached generation equals a loop over single prompts, and is never sampled."""

import itertools

import pytest
import torch
from perturbed_adapter import perturb_adapter
from tiny_backbone import PlainQuestion, sample_rows, tiny_data, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from gatera_lightning import AdapterConfig, inject_adapters, load_adapter, save_adapter
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.merging import merge_adapter
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules.batching.collate import collate_prompts
from gatera_lightning.generation.decoding import DecodingConfig, generate

PAD, EOS, OTHER_END = 2, 1, 9
LENGTHS = (7, 1, 40, 3, 19, 2, 33, 12)
PROMPTS = [torch.randint(10, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def adapted(tiny_llama):
    """``adapted("lora", "static")``: a model whose answers depend on the whole prompt and often end early."""

    def build(update="hira", gate="token"):
        model = tiny_llama(initializer_range=0.3, eos_token_id=EOS, pad_token_id=PAD).eval()
        with torch.no_grad():
            model.lm_head.weight[[EOS, OTHER_END]] *= 2
        inject_adapters(
            model, AdapterConfig(update=update, gate=gate, rank=4), torch.Generator().manual_seed(0)
        )
        return perturb_adapter(model, 0.5)

    return build


def greedy(model, prompt, steps, ends=(EOS,)):
    """Greedy completion of an unpadded prompt, without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in ends:
            break
    return ids[len(prompt) :]


def answers(model, batch_size=8, ends=(EOS,), prompts=PROMPTS, **decoding):
    """Answers of ``generate`` in batches, each up to its end; everything after it must be padding."""
    found = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        batch = collate_prompts(some, range(len(some)), pad_id=PAD, eos_id=EOS)
        for ids in generate(model, batch, DecodingConfig(**decoding)).tolist():
            length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            assert set(ids[length:]) <= {PAD}
            found.append(ids[:length])
    return found


@pytest.mark.parametrize("gate", ["none", "static", "token"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_generate_matches_greedy_loop(adapted, update, gate):
    model = adapted(update, gate)
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1  # some end early
    assert len({tuple(answer) for answer in expected}) > 5
    for batch_size, use_cache in ((8, True), (8, False), (3, True), (1, True)):
        assert answers(model, batch_size, max_new_tokens=8, use_cache=use_cache) == expected, (
            batch_size,
            use_cache,
        )


@pytest.mark.parametrize(
    ("update", "gate"), [("hira", "none"), ("lora", "none"), ("dora", "none"), ("hira", "static")]
)
def test_generate_beams_match_merged_model(adapted, update, gate):
    model = adapted(update, gate)
    found = {size: answers(model, size, beams=4, max_new_tokens=8) for size in (8, 3)}
    uncached = answers(model, beams=4, max_new_tokens=8, use_cache=False)
    single = answers(model, max_new_tokens=8)
    merge_adapter(model)
    expected = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), num_beams=4, max_new_tokens=8, do_sample=False)
        expected.append(ids[0, len(prompt) :].tolist())
    assert found == {8: expected, 3: expected}
    assert uncached == expected
    assert expected != single  # otherwise beam search would not show


def test_generate_beams_do_not_depend_on_batch_size(adapted):
    model = adapted()
    expected = answers(model, 1, beams=4, max_new_tokens=8)
    assert (
        answers(model, 3, beams=4, max_new_tokens=8)
        == answers(model, 8, beams=4, max_new_tokens=8)
        == expected
    )


@pytest.mark.parametrize("own", [[EOS, OTHER_END], [OTHER_END], OTHER_END])
def test_generate_stops_at_every_end_token(adapted, own):
    """The tokenizer's EOS, used in training, and the end tokens of the model's generation config."""
    model = adapted()
    plain = answers(model, max_new_tokens=16)
    model.generation_config.eos_token_id = own
    ends = (EOS, OTHER_END)
    found = answers(model, ends=ends, max_new_tokens=16)
    assert found == [greedy(model, prompt, 16, ends) for prompt in PROMPTS]
    assert {answer[-1] for answer in found} >= {EOS, OTHER_END}
    assert found != plain


def test_generate_respects_no_repeat_ngram_size(adapted):
    def repeated(ids):
        pairs = list(itertools.pairwise(ids))
        return len(pairs) - len(set(pairs))

    model = adapted()
    assert any(map(repeated, answers(model, max_new_tokens=16)))
    for prompt, answer in zip(
        PROMPTS, answers(model, max_new_tokens=16, no_repeat_ngram_size=2), strict=True
    ):
        assert repeated(prompt + answer) == repeated(prompt)


def test_generate_applies_length_penalty(adapted):
    model = adapted()
    short, plain, long = (
        answers(model, beams=4, max_new_tokens=12, length_penalty=power) for power in (-4.0, 1.0, 6.0)
    )
    assert plain == answers(model, beams=4, max_new_tokens=12)
    assert sum(map(len, short)) < sum(map(len, plain)) < sum(map(len, long))


def test_generate_stops_at_eos_without_model_end_token(adapted):
    model = adapted()
    expected = answers(model, max_new_tokens=8)
    model.generation_config.eos_token_id = None
    assert answers(model, max_new_tokens=8) == expected


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize(
    "recommended",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"length_penalty": 9.0},
        {"min_new_tokens": 8},
        {"max_length": 12},
        {"suppress_tokens": [EOS]},
        {"num_return_sequences": 2},
    ],
    ids=lambda recommended: next(iter(recommended)),
)
def test_generate_ignores_model_generation_config(adapted, recommended, beams):
    model = adapted()
    expected = answers(model, beams=beams, max_new_tokens=8)
    for name, value in recommended.items():
        setattr(model.generation_config, name, value)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert answers(model, beams=beams, max_new_tokens=8) == expected
    assert {name: getattr(model.generation_config, name) for name in recommended} == recommended


@pytest.mark.parametrize(("use_cache", "widths"), [(True, [40, 1, 1]), (False, [40, 41, 42])])
def test_generate_respects_use_cache(adapted, use_cache, widths):
    model = adapted()
    model.config.use_cache = False  # as it is while training
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    answers(model, max_new_tokens=3, use_cache=use_cache)
    assert seen == widths


def test_generate_truncates_at_max_new_tokens(adapted):
    model = adapted()
    complete = answers(model, max_new_tokens=8)
    for length in (1, 3):
        assert answers(model, max_new_tokens=length) == [answer[:length] for answer in complete]


def test_generate_runs_without_gradients(adapted):
    model = adapted()
    assert not generate(
        model, collate_prompts(PROMPTS, range(8), pad_id=PAD, eos_id=EOS), DecodingConfig()
    ).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_decoding_config_problems_name_setting():
    assert DecodingConfig().problems() == []
    assert DecodingConfig(beams=0, max_new_tokens=0).problems() == [
        "decoding.beams: 0; accepted: an integer of at least 1",
        "decoding.max_new_tokens: 0; accepted: an integer of at least 1",
    ]
    assert DecodingConfig(beams=4, length_penalty=0.9, no_repeat_ngram_size=4).problems() == []
    assert DecodingConfig(length_penalty=0.9, no_repeat_ngram_size=-1).problems() == [
        "decoding.no_repeat_ngram_size: -1; accepted: an integer of at least 0",
        "decoding.length_penalty: 0.9, with beams 1; accepted: 1, or more than 1 beam",
    ]
    assert DecodingConfig(beams=4, length_penalty=float("inf")).problems() == [
        "decoding.length_penalty: inf; accepted: a finite number"
    ]
    assert DecodingConfig(prepared=False, skip_below=0.1).problems() == [
        "decoding.prepared: false, with skip_below 0.1 and merge_above 1.0; "
        "accepted: true, or skip_below 0 and merge_above 1"
    ]


def test_test_run_writes_texts_of_greedy_loop(tiny_backbone, tmp_path):
    """End to end: prompts, padding, decoding, and the example that a text belongs to."""
    module = tiny_module(tiny_backbone, gate=TokenGateConfig(bias=1.0))
    module.configure_model()
    adapter = save_adapter(perturb_adapter(module.model, 4.0), tmp_path / "adapter")
    module.decoding = DecodingConfig(max_new_tokens=6)
    found = []
    for size in (1, 3, 8):
        report = EvaluationReport()
        data = tiny_data(tiny_backbone, evaluate_by=["generation"], eval_batch_size=size)
        tiny_trainer(tmp_path, report).test(module, datamodule=data, verbose=False)
        found.append([(row["example"], row["generation"]["text"]) for row in report.result.examples])
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_backbone),
        AutoTokenizer.from_pretrained(tiny_backbone),
    )
    load_adapter(model, adapter)
    model.eval()
    expected = []
    for example, question in enumerate(map(PlainQuestion.of, sample_rows("test")[:6])):
        ids = greedy(model, tokenizer(question.prompt).input_ids, 6, [tokenizer.eos_token_id])
        expected.append((example, tokenizer.decode(ids, skip_special_tokens=True)))
    assert found == [expected] * 3
    assert len({text for _, text in expected}) > 3
