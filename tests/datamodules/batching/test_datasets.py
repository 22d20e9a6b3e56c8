"""Batches from a token table: what each rank gets in one epoch."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.batch_schedule import build_batch_schedule
from gatera_lightning.datamodules.batching.datasets import TokenTable, TrainingBatches
from gatera_lightning.errors import ConfigError

LAYOUTS = {  # (ranks, accumulate): sizes of the steps of 27 examples with batch_size 6
    (1, 1): [3, 6, 6, 6, 6],
    (1, 2): [3, 6, 6, 6, 6],
    (2, 1): [3, 6, 6, 6, 6],
    (2, 2): [6, 6, 6, 9],
    (3, 2): [6, 6, 6, 9],
}


def _epoch(modules, split="train"):
    """The batches of one epoch as [batch][rank]; of the first loader if there are several."""
    loaders = [getattr(module, f"{split}_dataloader")() for module in modules]
    loaders = [loader[0] if isinstance(loader, list) else loader for loader in loaders]
    return list(zip(*map(list, loaders), strict=True))


def _ids(batches):
    return [int(i) for batch in batches for i in batch["example_ids"]]


def _candidates(batches):
    """(example, answer) of every sequence that is not a dummy."""
    pairs = [
        pair for batch in batches for pair in zip(_ids([batch]), batch["answer_ids"].tolist(), strict=True)
    ]
    return [pair for pair in pairs if pair[0] >= 0]


def _supervised(batches):
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)


def _tokens(batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


# --- training ---


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(("ranks", "accumulate"), LAYOUTS)
def test_training_epoch_covers_examples_and_step_totals(ranks, accumulate, train_on, make_ranks):
    together = _epoch(make_ranks(27, ranks=ranks, accumulate=accumulate, batch_size=6, train_on=train_on))
    assert Counter(_ids(batch for batches in together for batch in batches)) == Counter(range(27))
    steps = [together[i : i + accumulate] for i in range(0, len(together), accumulate)]
    steps = [[batch for batches in step for batch in batches] for step in steps]
    assert sorted(len(_ids(batches)) for batches in steps) == LAYOUTS[ranks, accumulate]
    for batches in steps:
        assert len(batches) == ranks * accumulate
        assert {batch["step_supervised_tokens"] for batch in batches} == {_supervised(batches)}
        assert {batch["step_tokens"] for batch in batches} == {_tokens(batches)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_totals_count_truncated_prompts(accumulate, make_ranks):
    modules = make_ranks(11, accumulate=accumulate, batch_size=4, max_length=40)
    assert any(modules[0].tables["train"]["truncated"])
    for step in range(2):
        batches = [batches[0] for batches in _epoch(modules)][step * accumulate : (step + 1) * accumulate]
        assert {batch["step_tokens"] for batch in batches} == {_tokens(batches)}
        assert max(batch["input_ids"].shape[1] for batch in batches) == 40


def test_training_merges_short_last_step(make_ranks):
    (module,) = make_ranks(13, accumulate=4, batch_size=6)
    batches = list(module.train_dataloader())
    assert len(module.train_dataloader()) == len(batches) == 8
    assert sorted(_ids(batches)) == list(range(13))
    assert sorted(len(_ids(batches[i : i + 4])) for i in (0, 4)) == [6, 7]


def test_training_batches_hold_correct_answers_only(make_ranks, tokenizer):
    (module,) = make_ranks(9, batch_size=4)
    for batch in module.train_dataloader():
        assert batch["answer_ids"].tolist() == batch["gold_ids"].tolist()
        for ids, mask, example in zip(
            batch["input_ids"], batch["response_mask"], batch["example_ids"], strict=True
        ):
            gold = int(example) % (2 + int(example) % 3)
            assert tokenizer.decode(ids[mask]) == f"the correct answer is answer{gold + 1}<eos>"


def test_settings_reach_batch_schedule(make_ranks):
    def sizes(**options):
        (module,) = make_ranks(40, batch_size=4, **options)
        batches = list(module.train_dataloader())
        padding = sum(batch["attention_mask"].numel() for batch in batches) - _tokens(batches)
        return [len(batch["example_ids"]) for batch in batches], padding, [_ids([batch]) for batch in batches]

    default = sizes()
    assert sizes() == default
    assert default[1] < sizes(group_by_length=False)[1]
    assert len(sizes(token_budget=150)[0]) > len(default[0]) == 10
    other = sizes(seed=1)[2]
    assert sorted(map(sorted, other)) != sorted(map(sorted, default[2]))


def test_training_batches_do_not_depend_on_workers(make_ranks):
    (without,), (with_workers,) = make_ranks(15, batch_size=4), make_ranks(15, batch_size=4, num_workers=2)
    here, there = (
        {tuple(_ids([b])): b for b in module.train_dataloader()} for module in (without, with_workers)
    )
    assert here.keys() == there.keys()
    for ids, batch in here.items():
        assert batch["labels"].tolist() == there[ids]["labels"].tolist()
        assert batch["step_supervised_tokens"] == there[ids]["step_supervised_tokens"]
        assert type(there[ids]["step_supervised_tokens"]) is int


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    count=st.integers(0, 40), accumulate=st.integers(1, 3), ranks=st.integers(1, 4), extra=st.integers(0, 5)
)
def test_training_batches_of_ranks_form_the_step(count, accumulate, ranks, extra):
    micro_batches = accumulate * ranks
    count += micro_batches
    steps = build_batch_schedule(
        [3] * count, [1] * count, batch_size=micro_batches + extra, micro_batches=micro_batches, seed=0
    )
    table = SimpleNamespace(
        batch=lambda indices, train_on, all_candidates, pack_length: {
            "indices": indices,
            "all_candidates": all_candidates,
        }
    )
    shares = [TrainingBatches(table, steps, "all", ranks=ranks, rank=rank) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(steps) * accumulate}
    for number, step in enumerate(steps):
        items = [share[number * accumulate + k]["indices"] for share in shares for k in range(accumulate)]
        assert all(items)
        assert not any(share[number * accumulate]["all_candidates"] for share in shares)
        assert sorted(i for item in items for i in item) == sorted(i for m in step.micro_batches for i in m)


@pytest.mark.parametrize(("ranks", "accumulate", "least"), [(1, 4, 4), (2, 2, 4), (3, 1, 3)])
def test_training_rejects_small_batch_size(ranks, accumulate, least, make_ranks):
    module = make_ranks(20, ranks=ranks, accumulate=accumulate, batch_size=least - 1)[0]
    message = f"batch_size: {least - 1} ex.*grad_batches {accumulate} × {ranks} ranks.*at least {least}"
    with pytest.raises(ConfigError, match=message):
        module.train_dataloader()
    assert len(make_ranks(20, ranks=ranks, accumulate=accumulate, batch_size=least)[0].train_dataloader()) > 0


@pytest.mark.parametrize(("limit", "count"), [(3, 3), (0.3, 5)])
def test_training_rejects_limit_within_a_step(limit, count, make_ranks):
    """The loss of an incomplete step would be divided by the totals of the complete one."""
    module = make_ranks(36, accumulate=2, batch_size=4, limit=limit)[0]
    with pytest.raises(
        ConfigError,
        match=rf"trainer\.limit_train_batches: {limit} .* ends an epoch after {count} micro-batches",
    ):
        module.train_dataloader()
    assert (
        make_ranks(36, accumulate=2, batch_size=4, limit=4)[0].train_dataloader().micro_batches_per_epoch == 4
    )
    assert (
        make_ranks(36, accumulate=2, batch_size=4, limit=50)[0].train_dataloader().micro_batches_per_epoch
        == 18
    )


def test_training_rejects_too_few_examples(make_ranks):
    with pytest.raises(ConfigError, match=r"data\.train: 3 examples cannot fill 4 micro-batches"):
        make_ranks(3, accumulate=4, batch_size=8)[0].train_dataloader()


# --- validation ---


@pytest.mark.parametrize("count", [5, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_covers_every_example_once(count, ranks, make_ranks):
    together = _epoch(
        make_ranks(count, ranks=ranks, eval_batch_size=2, stage="validate"), "val"
    )  # zip is strict
    ids = Counter(_ids(batch for batches in together for batch in batches))
    assert {i: n for i, n in ids.items() if i >= 0} == {i: 1 for i in range(count)}
    for batch in (batch for batches in together for batch in batches):
        assert batch["answer_ids"].tolist() == batch["gold_ids"].tolist()
        assert 1 <= len(batch["example_ids"]) <= 2


def test_validation_fills_ranks_with_dummy_examples(make_ranks):
    """5 examples, 2 ranks, 2 examples per batch: 2 + 2 and 1 + 0."""
    together = _epoch(make_ranks(5, ranks=2, eval_batch_size=2, stage="validate", train_on="all"), "val")
    assert [[len(_ids([b])) for b in batches] for batches in together] == [[2, 2], [1, 1]]
    filler = together[1][1]
    assert filler["example_ids"].tolist() == [-1]
    assert (filler["labels"] == IGNORE_INDEX).all()
    assert filler["step_supervised_tokens"] == 0
    assert -1 not in _ids([together[1][0], *together[0]])


@pytest.mark.parametrize("ranked", [True, False])
def test_validation_starts_with_longest_sequences(ranked, make_ranks):
    """By the length of the correct answers, or of the longest candidates."""
    (module,) = make_ranks(
        9, eval_batch_size=1, stage="validate", answer_format="content", rank_validation=ranked
    )
    widths = [batch["input_ids"].shape[1] for batch in module.val_dataloader()]
    assert len(set(widths)) > 3
    assert widths == sorted(widths, reverse=True)
    table = list(module.tables["validation"])
    by_longest = sorted(table, key=lambda row: -max(row["lengths"]))
    assert by_longest != sorted(
        table, key=lambda row: -row["lengths"][row["gold"]]
    )  # otherwise this tests nothing


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_ranked_validation_holds_all_candidates(train_on, make_ranks):
    (module,) = make_ranks(5, eval_batch_size=4, stage="validate", train_on=train_on, rank_validation=True)
    batches = list(module.val_dataloader())
    assert all(batch["all_candidates_present"] for batch in batches)
    assert Counter(_candidates(batches)) == Counter(
        (row, answer) for row in range(5) for answer in range(2 + row % 3)
    )
    for batch in batches:
        expected = batch["attention_mask"].sum(1) - 1 if train_on == "all" else batch["response_mask"].sum(1)
        assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == expected.tolist()


def test_unranked_validation_does_not_hold_all_candidates(make_ranks):
    (module,) = make_ranks(5, stage="fit", batch_size=4)
    assert not any(
        batch["all_candidates_present"] for batch in [*module.val_dataloader(), *module.train_dataloader()]
    )


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_validation_supervises_the_same_tokens_as_training(train_on, make_ranks):
    (module,) = make_ranks(6, stage="fit", train_on=train_on, batch_size=6, eval_batch_size=6)
    (train,), (validation,) = list(module.train_dataloader()), list(module.val_dataloader())
    assert (
        _supervised([train])
        == _supervised([validation])
        == train["step_supervised_tokens"]
        == validation["step_supervised_tokens"]
    )


# --- test: candidates ---


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("eval_batch_size", [1, 4])
def test_candidates_are_scored_exactly_once(ranks, eval_batch_size, stage, make_ranks):
    together = _epoch(make_ranks(7, ranks=ranks, eval_batch_size=eval_batch_size, stage=stage), stage)
    found = Counter()
    for batch in (batch for batches in together for batch in batches):
        for example, answer, gold in zip(
            batch["example_ids"], batch["answer_ids"], batch["gold_ids"], strict=True
        ):
            if example >= 0:
                found[int(example), int(answer)] += 1
                assert int(gold) == int(example) % (2 + int(example) % 3)
    assert found == Counter((row, answer) for row in range(7) for answer in range(2 + row % 3))


OPTIONS = [2, 5, 3, 4, 2, 5, 4, 2, 3, 2, 2]  # number of candidates of each question


@pytest.fixture
def make_mixed(make_data, write):
    """``make_mixed(2, …)``: one data module per rank, over questions with 2 to 5 candidates."""

    def build(ranks=1, **settings):
        rows = [
            {
                "instruction": f"{'Well then. ' * (number % 3)}Which one is number {number}?\n\n"
                + " ".join(f"Answer{k + 1}: {'very ' * (number * k % 5)}thing {k}" for k in range(count))
                + "\n\nAnswer format: "
                + "/".join(f"answer{k + 1}" for k in range(count)),
                "answer": f"answer{1 + number % count}",
            }
            for number, count in enumerate(OPTIONS)
        ]
        settings = {
            "test": [write("mixed.json", rows)],
            "answer_format": "content",
            "stage": "test",
        } | settings
        return [make_data(ranks=ranks, rank=rank, **settings) for rank in range(ranks)]

    return build


@pytest.mark.parametrize(
    ("eval_batch_size", "questions"),
    [(1, 1), (3, 1), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3), (60, 11)],
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_candidates_of_one_question_share_a_batch(ranks, eval_batch_size, questions, make_mixed):
    """Even if one question has more candidates than ``eval_batch_size``."""
    together = _epoch(make_mixed(ranks, eval_batch_size=eval_batch_size), "test")
    batches = [batch for batches in together for batch in batches]
    found = []
    for batch in batches:
        assert batch["all_candidates_present"] is True
        ids = [i for i in dict.fromkeys(_ids([batch])) if i >= 0]
        assert _candidates([batch]) == [(i, answer) for i in ids for answer in range(OPTIONS[i])]
        assert len(batch["example_ids"]) <= max(eval_batch_size, 5)
        if ids:
            assert batch["gold_ids"].tolist() == [i % OPTIONS[i] for i in ids for _ in range(OPTIONS[i])]
            found.append(ids)
    assert sorted(i for ids in found for i in ids) == list(range(11))
    assert sorted(map(len, found)) == sorted(
        [questions] * (11 // questions) + [11 % questions] * (11 % questions > 0)
    )


def test_answer_characters_count_candidate_text(make_mixed):
    (module,) = make_mixed(eval_batch_size=8)
    characters = {}
    for batches in _epoch([module], "test"):
        for pair, count in zip(_candidates(batches), batches[0]["answer_characters"].tolist(), strict=True):
            characters[pair] = count
    assert characters == {
        (number, k): len("very " * (number * k % 5) + "thing 0")
        for number, count in enumerate(OPTIONS)
        for k in range(count)
    }


def test_candidates_fill_ranks_with_dummy_examples(make_mixed):
    """11 questions, 2 per batch, 4 ranks: 6 batches, so two ranks need an additional one."""
    together = _epoch(make_mixed(4, eval_batch_size=10), "test")
    assert [[len(set(_ids([batch]))) for batch in batches] for batches in together] == [
        [2, 2, 2, 2],
        [2, 1, 1, 1],
    ]
    for filler in together[1][2:]:
        assert filler["example_ids"].tolist() == [-1]
        assert (filler["labels"] == IGNORE_INDEX).all()
        assert filler["step_supervised_tokens"] == 0
        assert filler["all_candidates_present"] is True


def _compositions(modules, index=0):
    """Example ids of every batch that is not a dummy, in order."""
    loaders = [list(module.test_dataloader()[index]) for module in modules]
    batches = [batch for together in zip(*loaders, strict=True) for batch in together]
    return [ids for ids in (list(dict.fromkeys(_ids([batch]))) for batch in batches) if ids != [-1]]


@pytest.mark.parametrize("kind", ["likelihood", "generation"])
def test_batch_composition_is_independent_of_ranks_and_interruptions(kind, make_mixed):
    settings = {"evaluate_by": [kind], "eval_batch_size": 10 if kind == "likelihood" else 2}
    alone = _compositions(make_mixed(1, **settings))
    assert [len(ids) for ids in alone] == [2, 2, 2, 2, 2, 1]
    assert _compositions(make_mixed(3, **settings)) == alone
    done = {*alone[0], *alone[3], alone[4][1]}
    modules = make_mixed(2, **settings)
    for module in modules:
        module.skip_answered({kind: done})
    assert _compositions(modules) == [alone[1], alone[2], alone[4][:1], alone[5]]


def test_skip_answered_is_separate_for_each_evaluation(make_mixed):
    (module,) = make_mixed(evaluate_by=["generation", "likelihood"], eval_batch_size=5)
    module.skip_answered({"likelihood": set(range(9)), "generation": {10}})
    prompts, questions = _compositions([module]), _compositions([module], 1)
    assert sorted(i for ids in prompts for i in ids) == list(range(10))
    assert sorted(i for ids in questions for i in ids) == [9, 10]


def test_skip_answered_does_not_affect_validation(make_ranks):
    (module,) = make_ranks(4, stage="validate")
    module.skip_answered({"likelihood": {0, 1, 2, 3}})
    assert sorted(_ids(module.val_dataloader())) == [0, 1, 2, 3]


def test_skip_answered_leaves_a_dummy_batch(make_mixed):
    for module in make_mixed(2, evaluate_by=["likelihood", "generation"]):
        module.skip_answered({"likelihood": set(range(11)), "generation": set(range(11))})
        for loader in module.test_dataloader():
            assert [batch["example_ids"].tolist() for batch in loader] == [[-1]]


def test_candidates_are_scored_by_answer_tokens_only(make_ranks):
    (module,) = make_ranks(3, stage="test", train_on="all", answer_format="content")
    for (batch,) in _epoch([module], "test"):
        assert (batch["labels"] != IGNORE_INDEX).equal(batch["response_mask"])


def test_candidates_share_truncated_prompt(make_ranks):
    (module,) = make_ranks(7, stage="test", answer_format="content", max_length=40)
    prompts = {}
    for (batch,) in _epoch([module], "test"):
        for ids, mask, answer, example in zip(
            batch["input_ids"],
            batch["attention_mask"].bool(),
            batch["response_mask"],
            batch["example_ids"],
            strict=True,
        ):
            prompts.setdefault(int(example), set()).add(tuple(ids[mask & ~answer].tolist()))
    assert any(module.tables["test"]["truncated"])
    assert {example: len(found) for example, found in prompts.items()} == {example: 1 for example in range(7)}


# --- test: prompts to complete ---


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", ["test", "predict"])
def test_prompts_cover_every_example_once(ranks, stage, make_mixed, tokenizer):
    modules = make_mixed(ranks, evaluate_by=["generation"], eval_batch_size=4, stage=stage)
    prompts = {row["example"]: row["prompt"] for row in modules[0].tables["test"]}
    found = {}
    for batch in (batch for batches in _epoch(modules, stage) for batch in batches):
        assert len(batch["example_ids"]) <= 4
        assert batch["attention_mask"][:, -1].all()  # left padding
        assert (batch["pad_id"], batch["eos_id"]) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        for ids, mask, example in zip(
            batch["input_ids"], batch["attention_mask"], batch["example_ids"], strict=True
        ):
            if example >= 0:
                assert int(example) not in found
                found[int(example)] = ids[mask.bool()].tolist()
    assert found == prompts


def test_prompts_start_with_longest(make_mixed):
    (module,) = make_mixed(evaluate_by=["generation"], eval_batch_size=1)
    widths = [batch["input_ids"].shape[1] for batch in module.test_dataloader()[0]]
    assert len(set(widths)) > 1
    assert widths == sorted(widths, reverse=True)


def test_prompts_without_examples_are_dummy(make_mixed):
    table = TokenTable(make_mixed()[0].tables["test"], pad_id=5, eos_id=6)
    batch = table.prompts([])
    assert batch["example_ids"].tolist() == [-1]
    assert batch["attention_mask"].all()
    assert batch["input_ids"].shape[1] > 1  # models need at least one token
    assert (batch["pad_id"], batch["eos_id"]) == (5, 6)
    assert table.prompts([3, 1])["example_ids"].tolist() == [3, 1]


def test_test_loaders_follow_evaluate_by(make_mixed):
    for ways in (["likelihood", "generation"], ["generation", "likelihood"], ["generation"], ["likelihood"]):
        (module,) = make_mixed(evaluate_by=ways)
        kinds = [
            "likelihood" if "labels" in next(iter(loader)) else "generation"
            for loader in module.test_dataloader()
        ]
        assert kinds == ways


def test_evaluation_workers_leave_global_generator_unchanged(make_mixed):
    """Batches do not change either."""
    (without,), (with_workers,) = (
        make_mixed(evaluate_by=["likelihood", "generation"], num_workers=n) for n in (0, 2)
    )
    before = torch.get_rng_state()
    for here, there in zip(without.test_dataloader(), with_workers.test_dataloader(), strict=True):
        for one, other in zip(here, there, strict=True):
            assert {name: torch.as_tensor(value).tolist() for name, value in one.items()} == {
                name: torch.as_tensor(value).tolist() for name, value in other.items()
            }
    assert torch.equal(torch.get_rng_state(), before)
