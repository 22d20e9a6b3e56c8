"""Candidates upon the keys and values of the prompt that they share: an unpadded forward a row says the same."""

import pytest
import torch
from tiny_backbone import tiny_module
from transformers import AutoConfig, AutoModelForCausalLM

from gatera_lightning import AdapterConfig, adapter_parameters, inject_adapters
from gatera_lightning.datamodules.batching.collate import TokenSequence, collate
from gatera_lightning.evaluation.candidate_scoring import candidate_log_likelihoods

PAD = 17  # a token that prompts and answers hold too


def ids(length, seed):
    return torch.randint(10, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def question(example, prompt, *answers):
    """The rows of a question: ``prompt`` tokens, and a candidate of each length in ``answers``."""
    candidates = [ids(length, 100 * example + number + 1) for number, length in enumerate(answers)]
    return [
        TokenSequence(ids(prompt, 9_000 + example), tokens, example, i)
        for i, tokens in enumerate(candidates)
    ]


MANY = question(3, 40, 5, 1, 9, 2, 30, 1, 4, 7)
ONE = question(0, 7, 2)
SHORT = question(8, 1, 3, 12)
ONE_TOKEN = question(5, 23, 1, 1, 1)
NO_PROMPT = question(6, 0, 4, 1, 2)
FILLER = [TokenSequence(ids(11, 1), ids(3, 2), -1)]
ROWS = MANY + ONE + SHORT + ONE_TOKEN


def move(model, size=0.5):
    """An adapter that has learned something."""
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(
                size
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )


@pytest.fixture(scope="module")
def build(tiny_llama):
    """``build("dora", "static")``: a model that is sure of little, so that each token's log p differs; without cache."""

    def build(update="hira", gate="token", **config):
        model = tiny_llama(initializer_range=0.3, **config).eval()
        inject_adapters(
            model, AdapterConfig(update=update, gate=gate, rank=4), torch.Generator().manual_seed(0)
        )
        move(model)
        model.config.use_cache = False  # as load_backbone leaves it
        return model

    return build


@pytest.fixture(scope="module")
def model(build):
    return build()


def row_by_row(model, rows):
    """``(Σ log p, tokens)`` of each row's answer, by a forward of its own without padding; nothing predicts a first token."""
    found = []
    for row in rows:
        tokens = row.prompt_ids + row.answer_ids
        with torch.no_grad():
            log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        places = range(max(1, len(row.prompt_ids)), len(tokens))
        found.append((sum(float(log_p[i - 1, tokens[i]]) for i in places), len(places)))
    return found


def batch_of(rows, train_on="response"):
    return collate(rows, pad_id=PAD, train_on=train_on, all_candidates_present=True)


def together(model, rows, **collating):
    with torch.no_grad():
        log_likelihoods, tokens = candidate_log_likelihoods(model, batch_of(rows, **collating))
    assert log_likelihoods.dtype == torch.float32
    return list(zip(log_likelihoods.tolist(), tokens.tolist(), strict=True))


def assert_same(found, expected):
    assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5)


def forwards(model):
    """A list that fills with the (rows, tokens) of every forward, and the handle that ends it."""
    seen = []
    return seen, model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape))
    )


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["none", "static", "token"])
@pytest.mark.parametrize("update", ["lora", "dora", "hira"])
def test_scores_equal_a_plain_forward_a_row(build, update, gate):
    model = build(update, gate)
    expected = row_by_row(model, ROWS)
    assert_same(together(model, ROWS), expected)
    assert len({round(value, 3) for value, _ in expected}) == len(ROWS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "rows",
    [ONE_TOKEN, ONE, MANY, NO_PROMPT, NO_PROMPT + ROWS, question(6, 0, 1, 1), ONE_TOKEN + question(6, 0, 1)],
    ids=[
        "one-token answers",
        "one row",
        "one question",
        "no prompt",
        "no prompt among prompts",
        "nothing",
        "first tokens",
    ],
)
def test_short_and_empty_prompts_and_answers(build, attention, rows):
    model = build(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert_same(together(model, rows), row_by_row(model, rows))


def test_a_row_that_stands_for_no_example_scores_nothing_and_disturbs_nobody(model):
    assert together(model, FILLER) == [(0.0, 0)]
    found = together(model, ROWS + FILLER)
    assert found[-1] == (0.0, 0)
    assert_same(found[:-1], row_by_row(model, ROWS))


def test_scores_do_not_depend_on_what_else_is_in_the_batch(model):
    expected = (
        together(model, MANY) + together(model, ONE) + together(model, SHORT) + together(model, NO_PROMPT)
    )
    assert_same(together(model, MANY + ONE + SHORT + NO_PROMPT), expected)
    assert_same(
        together(model, NO_PROMPT + SHORT + ONE + MANY),
        expected[11:] + expected[9:11] + expected[8:9] + expected[:8],
    )
    assert_same([pair for row in MANY for pair in together(model, [row])], expected[:8])


def test_equal_prompts_of_two_questions_are_two(model):
    again = [TokenSequence(row.prompt_ids, row.answer_ids[::-1], 77, row.answer) for row in MANY]
    assert_same(together(model, MANY + again), row_by_row(model, MANY + again))


def test_what_carries_loss_in_training_is_no_matter(model):
    assert together(model, ROWS, train_on="all") == together(model, ROWS)


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},  # shorter than most prompts, and than the longest answer
    "gemma2": {"sliding_window": 8, "attn_implementation": "eager"},  # soft caps behind the output head
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
    },  # learned
    "bloom": {
        "n_layer": 2,
        "n_head": 4,
        "attn_implementation": "eager",
    },  # no positions, but biases by distance
}


def of_family(name, **config):
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
def test_any_family_gives_what_it_gives_row_by_row(name):
    model = of_family(name, **FAMILIES[name])
    rows = ROWS + NO_PROMPT
    assert_same(together(model, rows), row_by_row(model, rows))


# --- the cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "shapes"),
    [
        (ROWS, [(4, 40), (14, 29)]),
        (MANY, [(1, 40), (8, 29)]),
        (ONE, [(1, 7), (1, 1)]),
        (ONE_TOKEN, [(1, 23), (3, 1)]),
        (FILLER, [(1, 11), (1, 2)]),
    ],
    ids=["four questions", "one", "one row", "one-token answers", "no example"],
)
def test_two_forwards_whatever_the_batch_and_each_prompt_once(model, rows, shapes):
    """Sharded processes wait for each other's forwards, so there must be as many everywhere."""
    seen, handle = forwards(model)
    together(model, rows)
    handle.remove()
    assert seen == shapes


def test_the_model_is_left_as_it_was(model):
    before = [len(module._forward_pre_hooks) for module in model.modules()]
    together(model, ROWS)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    assert model.config.use_cache is False
    assert model(torch.tensor([[20, 21]])).past_key_values is None


# --- who takes this path ---------------------------------------------------------------------------------------------


@pytest.fixture
def step(model):
    """``step()``: what a test step gives for ROWS, and how many forwards it ran."""
    module = tiny_module("nowhere")
    module.model = model

    def run(model=model, batch=None):
        module.model = model
        seen, handle = forwards(model)
        with torch.no_grad():
            found = module.test_step(batch_of(ROWS) if batch is None else batch, 0)
        handle.remove()
        return list(zip(found["log_likelihoods"].tolist(), found["tokens"].tolist(), strict=True)), len(seen)

    run.module = module
    return run


def test_a_test_step_shares_prompts(step, model):
    found, count = step()
    assert (found, count) == (together(model, ROWS), 2)


def test_without_a_cache_rows_are_computed_whole_with_the_same_scores(step, model):
    step.module.decoding.use_cache = False
    found, count = step()
    assert count == 1
    assert_same(found, row_by_row(model, ROWS))


def test_a_model_with_a_state_is_computed_whole_with_the_same_scores(step, model, monkeypatch):
    """A recurrent state cannot be handed from a prompt to its candidates as keys and values are."""
    monkeypatch.setattr(type(model), "_is_stateful", True)
    found, count = step()
    assert count == 1
    assert_same(found, row_by_row(model, ROWS))


def test_mamba_is_such_a_model(step):
    model = of_family("mamba", state_size=4, attn_implementation="eager")
    model.config.use_cache = False
    found, count = step(model)
    assert count == 1
    assert_same(found, row_by_row(model, ROWS))


def test_right_answers_alone_are_computed_whole(step, model):
    rows = ONE + SHORT[:1]
    batch = collate(rows, pad_id=PAD, train_on="response", all_candidates_present=False)
    found, count = step(batch=batch)
    assert count == 1
    assert_same(found, row_by_row(model, rows))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("lfm2", {"layer_types": ["conv", "conv"]}),
        ("minimax", {"num_local_experts": 2}),
    ],
    ids=["LFM2", "convolutions alone", "MiniMax"],
)
def test_a_state_that_is_not_called_one_is_computed_whole(name, config):
    module = tiny_module("nowhere")
    module.model = of_family(name, **config)
    module.model.config.use_cache = False
    with torch.no_grad():
        found = module.test_step(batch_of(ROWS), 0)
    assert_same(
        list(zip(found["log_likelihoods"].tolist(), found["tokens"].tolist(), strict=True)),
        row_by_row(module.model, ROWS),
    )
