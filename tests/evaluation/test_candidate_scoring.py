"""Scores of candidates that share a prompt equal those of one unpadded forward pass per candidate."""

import pytest
import torch
from perturbed_adapter import perturb_adapter
from tiny_backbone import tiny_module
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import AdapterConfig, inject_adapters
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.evaluation.candidate_scoring import candidate_log_likelihoods

PAD = 17  # also occurs in prompts and answers


def ids(length, seed):
    return torch.randint(10, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def question(example, prompt, *answers):
    """Sequences of a question: a prompt of ``prompt`` tokens with candidates of ``answers`` tokens."""
    candidates = [ids(length, 100 * example + number + 1) for number, length in enumerate(answers)]
    return [
        TokenSequence(ids(prompt, 9_000 + example), tokens, example, i) for i, tokens in enumerate(candidates)
    ]


MANY = question(3, 40, 5, 1, 9, 2, 30, 1, 4, 7)
ONE = question(0, 7, 2)
SHORT = question(8, 1, 3, 12)
ONE_TOKEN = question(5, 23, 1, 1, 1)
NO_PROMPT = question(6, 0, 4, 1, 2)
DUMMY = [TokenSequence(ids(11, 1), ids(3, 2), -1)]
ALL = MANY + ONE + SHORT + ONE_TOKEN


@pytest.fixture(scope="module")
def build(tiny_llama):
    """``build("dora", "static")``: a model whose predictions differ between tokens."""

    def build(update="hira", gate="token", **config):
        model = tiny_llama(initializer_range=0.3, **config).eval()
        inject_adapters(
            model, AdapterConfig(update=update, gate=gate, rank=4), torch.Generator().manual_seed(0)
        )
        perturb_adapter(model, 0.5)
        model.config.use_cache = False  # as load_backbone leaves it
        return model

    return build


@pytest.fixture(scope="module")
def model(build):
    return build()


def one_by_one(model, sequences):
    """``(Σ log p, tokens)`` of each answer, by separate unpadded forward passes."""
    found = []
    for sequence in sequences:
        tokens = sequence.prompt_ids + sequence.answer_ids
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        positions = range(max(1, len(sequence.prompt_ids)), len(tokens))
        found.append((sum(float(log_p[i - 1, tokens[i]]) for i in positions), len(positions)))
    return found


def batch_of(sequences, train_on="response"):
    return collate(sequences, pad_id=PAD, train_on=train_on, all_candidates_present=True)


def together(model, sequences, **collating):
    with torch.no_grad():
        log_likelihoods, tokens = candidate_log_likelihoods(model, batch_of(sequences, **collating))
    assert log_likelihoods.dtype == torch.float32
    return list(zip(log_likelihoods.tolist(), tokens.tolist(), strict=True))


def assert_same(found, expected):
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)


def forwards(model):
    """A list that records the (sequences, tokens) of every forward pass, and the handle that stops it."""
    seen = []
    return seen, model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape))
    )


# --- scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "static", "token"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_candidate_log_likelihoods_match_forward_per_candidate(build, update, gate):
    model = build(update, gate)
    expected = one_by_one(model, ALL)
    assert_same(together(model, ALL), expected)
    assert len({round(value, 3) for value, _ in expected}) == len(ALL)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "sequences",
    [ONE_TOKEN, ONE, MANY, NO_PROMPT, NO_PROMPT + ALL, question(6, 0, 1, 1), ONE_TOKEN + question(6, 0, 1)],
    ids=[
        "one-token answers",
        "one candidate",
        "one question",
        "no prompt",
        "no prompt among prompts",
        "nothing",
        "first tokens",
    ],
)
def test_candidate_log_likelihoods_of_short_prompts_and_answers(build, attention, sequences):
    model = build(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert_same(together(model, sequences), one_by_one(model, sequences))


def test_candidate_log_likelihoods_of_dummy_examples_are_zero(model):
    assert together(model, DUMMY) == [(0.0, 0)]
    found = together(model, ALL + DUMMY)
    assert found[-1] == (0.0, 0)
    assert_same(found[:-1], one_by_one(model, ALL))


def test_candidate_log_likelihoods_do_not_depend_on_batch(model):
    expected = (
        together(model, MANY) + together(model, ONE) + together(model, SHORT) + together(model, NO_PROMPT)
    )
    assert_same(together(model, MANY + ONE + SHORT + NO_PROMPT), expected)
    assert_same(
        together(model, NO_PROMPT + SHORT + ONE + MANY),
        expected[11:] + expected[9:11] + expected[8:9] + expected[:8],
    )
    assert_same([pair for one in MANY for pair in together(model, [one])], expected[:8])


def test_candidate_log_likelihoods_of_equal_prompts(model):
    again = [TokenSequence(one.prompt_ids, one.answer_ids[::-1], 77, one.answer) for one in MANY]
    assert_same(together(model, MANY + again), one_by_one(model, MANY + again))


def test_candidate_log_likelihoods_do_not_depend_on_train_on(model):
    assert together(model, ALL, train_on="all") == together(model, ALL)


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},  # shorter than most prompts and than the longest answer
    "gemma2": {"sliding_window": 8, "attn_implementation": "eager"},  # soft caps after the output head
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "llama4_text": {
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "no_rope_layers": [1, 0],
    },
    "phi3": {"pad_token_id": 0, "eos_token_id": 1},
    "gpt_neox": {},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },  # learned positions
    "bloom": {
        "n_layer": 2,
        "n_head": 4,
        "attn_implementation": "eager",
    },  # attention biases by distance instead of positions
}


def model_of_family(name, **config):
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = config.pop("attn_implementation", "sdpa")
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, **(sizes | config)), attn_implementation=attention
        ).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_candidate_log_likelihoods_of_model_families(name):
    model = model_of_family(name, **FAMILIES[name])
    sequences = ALL + NO_PROMPT
    assert_same(together(model, sequences), one_by_one(model, sequences))


# --- cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "shapes"),
    [
        (ALL, [(4, 40), (14, 29)]),
        (MANY, [(1, 40), (8, 29)]),
        (ONE, [(1, 7), (1, 1)]),
        (ONE_TOKEN, [(1, 23), (3, 1)]),
        (DUMMY, [(1, 11), (1, 2)]),
    ],
    ids=["four questions", "one question", "one candidate", "one-token answers", "dummy example"],
)
def test_candidate_log_likelihoods_run_two_forwards(model, sequences, shapes):
    """Every rank of a sharded model must run the same number of forward passes."""
    seen, handle = forwards(model)
    together(model, sequences)
    handle.remove()
    assert seen == shapes


def test_candidate_log_likelihoods_leave_model_unchanged(model):
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    together(model, ALL)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    assert model.config.use_cache is False
    assert model(torch.tensor([[20, 21]])).past_key_values is None


# --- when it is used ----------------------------------------------------------------------------------------


@pytest.fixture
def step(model):
    """``step()``: scores of a test step for ALL, and the number of its forward passes."""
    module = tiny_module("nowhere")
    module.model = model

    def run(model=model, batch=None):
        module.model = model
        seen, handle = forwards(model)
        with torch.no_grad():
            found = module.test_step(batch_of(ALL) if batch is None else batch, 0)
        handle.remove()
        return list(zip(found["log_likelihoods"].tolist(), found["tokens"].tolist(), strict=True)), len(seen)

    run.module = module
    return run


def test_test_step_shares_prompts(step, model):
    found, count = step()
    assert (found, count) == (together(model, ALL), 2)


def test_test_step_without_cache_runs_whole_sequences(step, model):
    step.module.decoding.use_cache = False
    found, count = step()
    assert count == 1
    assert_same(found, one_by_one(model, ALL))


def test_test_step_of_stateful_model_runs_whole_sequences(step, model, monkeypatch):
    """Candidates cannot continue from a recurrent state as they do from keys and values."""
    monkeypatch.setattr(type(model), "_is_stateful", True)
    found, count = step()
    assert count == 1
    assert_same(found, one_by_one(model, ALL))


def test_test_step_of_mamba_runs_whole_sequences(step):
    model = model_of_family("mamba", state_size=4, attn_implementation="eager")
    model.config.use_cache = False
    found, count = step(model)
    assert count == 1
    assert_same(found, one_by_one(model, ALL))


def test_test_step_of_correct_answers_runs_whole_sequences(step, model):
    sequences = ONE + SHORT[:1]
    batch = collate(sequences, pad_id=PAD, train_on="response", all_candidates_present=False)
    found, count = step(batch=batch)
    assert count == 1
    assert_same(found, one_by_one(model, sequences))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("lfm2", {"layer_types": ["conv", "conv"]}),
        ("minimax", {"num_local_experts": 2}),
    ],
    ids=["LFM2", "convolutions only", "MiniMax"],
)
def test_test_step_of_hybrid_model_runs_whole_sequences(name, config):
    module = tiny_module("nowhere")
    module.model = model_of_family(name, **config)
    module.model.config.use_cache = False
    with torch.no_grad():
        found = module.test_step(batch_of(ALL), 0)
    assert_same(
        list(zip(found["log_likelihoods"].tolist(), found["tokens"].tolist(), strict=True)),
        one_by_one(module.model, ALL),
    )
