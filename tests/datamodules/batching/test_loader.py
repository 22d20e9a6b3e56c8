"""Loaders: what each process gets in one epoch, and when tokens are read from the cache."""

import logging
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batch import IGNORE_INDEX
from gatera_lightning.datamodules.batching.batch_schedule import build_batch_schedule
from gatera_lightning.datamodules.batching.datasets import TokenTable, TrainingBatches
from gatera_lightning.datamodules.example import Example
from gatera_lightning.datamodules.tokenization import cache as tables
from gatera_lightning.errors import ConfigError

LAYOUTS = {  # (ranks, accumulate): rows of the steps that 27 rows make, 6 a step
    (1, 1): [3, 6, 6, 6, 6],
    (1, 2): [3, 6, 6, 6, 6],
    (2, 1): [3, 6, 6, 6, 6],
    (2, 2): [6, 6, 6, 9],
    (3, 2): [6, 6, 6, 9],
}


@pytest.fixture
def make_all(make_data, write, rows):
    """One data module per rank over the same rows; ``make_all(11, ranks=2)``."""

    def build(count, *, ranks=1, stage="fit", **options):
        source = [write("rows.json", rows(count))]
        sources = {"train": source, "validation": source, "test": source}
        return [
            make_data(ranks=ranks, rank=rank, stage=stage, **(sources | options)) for rank in range(ranks)
        ]

    return build


def _epoch(modules, split="train"):
    """All ranks' batches of one epoch, side by side: [batch][rank]; of the first loader where there are several."""
    loaders = [getattr(module, f"{split}_dataloader")() for module in modules]
    loaders = [loader[0] if isinstance(loader, list) else loader for loader in loaders]
    return list(zip(*map(list, loaders), strict=True))


def _ids(batches):
    return [int(i) for batch in batches for i in batch["example_ids"]]


def _candidates(batches):
    """(example, answer) of every row that counts."""
    pairs = [
        pair for batch in batches for pair in zip(_ids([batch]), batch["answer_ids"].tolist(), strict=True)
    ]
    return [pair for pair in pairs if pair[0] >= 0]


def _targets(batches):
    return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)


def _tokens(batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


# --- training ---


@pytest.mark.parametrize("train_on", ["response", "all"])
@pytest.mark.parametrize(("ranks", "accumulate"), LAYOUTS)
def test_an_epoch_over_all_ranks(ranks, accumulate, train_on, make_all):
    together = _epoch(make_all(27, ranks=ranks, accumulate=accumulate, batch_size=6, train_on=train_on))
    assert Counter(_ids(batch for batches in together for batch in batches)) == Counter(range(27))
    steps = [together[i : i + accumulate] for i in range(0, len(together), accumulate)]
    steps = [[batch for batches in step for batch in batches] for step in steps]
    assert sorted(len(_ids(batches)) for batches in steps) == LAYOUTS[ranks, accumulate]
    for batches in steps:
        assert len(batches) == ranks * accumulate
        assert {batch["step_supervised_tokens"] for batch in batches} == {_targets(batches)}
        assert {batch["step_tokens"] for batch in batches} == {_tokens(batches)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_totals_count_shortened_prompts_as_they_are(accumulate, make_all):
    modules = make_all(11, accumulate=accumulate, batch_size=4, max_length=40)
    assert any(modules[0].tables["train"]["truncated"])
    for step in range(2):
        batches = [batches[0] for batches in _epoch(modules)][step * accumulate : (step + 1) * accumulate]
        assert {batch["step_tokens"] for batch in batches} == {_tokens(batches)}
        assert max(batch["input_ids"].shape[1] for batch in batches) == 40


def test_a_last_step_too_small_joins_the_one_before(make_all):
    (module,) = make_all(13, accumulate=4, batch_size=6)
    batches = list(module.train_dataloader())
    assert len(module.train_dataloader()) == len(batches) == 8
    assert sorted(_ids(batches)) == list(range(13))
    assert sorted(len(_ids(batches[i : i + 4])) for i in (0, 4)) == [6, 7]


def test_every_rank_knows_the_same_steps(make_all):
    for batches in _epoch(make_all(27, ranks=2, accumulate=2, batch_size=6)):
        assert len({(batch["step_supervised_tokens"], batch["step_tokens"]) for batch in batches}) == 1


def test_the_position_of_a_loader_does_not_depend_on_the_rank(make_all):
    """Only rank 0's position is saved."""
    states = []
    for module in make_all(27, ranks=2, accumulate=2, batch_size=6):
        loader = module.train_dataloader()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        states.append(loader.state_dict())
    assert states[0] == states[1]


def test_training_rows_hold_the_right_answer_only(make_all, tokenizer):
    (module,) = make_all(9, batch_size=4)
    for batch in module.train_dataloader():
        assert batch["answer_ids"].tolist() == batch["gold_ids"].tolist()
        for ids, mask, example in zip(
            batch["input_ids"], batch["response_mask"], batch["example_ids"], strict=True
        ):
            gold = int(example) % (2 + int(example) % 3)
            assert tokenizer.decode(ids[mask]) == f"the correct answer is answer{gold + 1}<eos>"


def test_settings_reach_the_plan(make_all):
    def sizes(**options):
        (module,) = make_all(40, batch_size=4, **options)
        batches = list(module.train_dataloader())
        padding = sum(batch["attention_mask"].numel() for batch in batches) - _tokens(batches)
        return [len(batch["example_ids"]) for batch in batches], padding, [_ids([batch]) for batch in batches]

    default = sizes()
    assert sizes() == default
    assert default[1] < sizes(group_by_length=False)[1]
    assert len(sizes(token_budget=150)[0]) > len(default[0]) == 10
    other = sizes(seed=1)[2]
    assert sorted(map(sorted, other)) != sorted(map(sorted, default[2]))


def test_workers_give_the_same_batches(make_all):
    (alone,), (helped,) = make_all(15, batch_size=4), make_all(15, batch_size=4, num_workers=2)
    here, there = ({tuple(_ids([b])): b for b in module.train_dataloader()} for module in (alone, helped))
    assert here.keys() == there.keys()
    for ids, batch in here.items():
        assert batch["labels"].tolist() == there[ids]["labels"].tolist()
        assert batch["step_supervised_tokens"] == there[ids]["step_supervised_tokens"]
        assert type(there[ids]["step_supervised_tokens"]) is int


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 40), accumulate=st.integers(1, 3), ranks=st.integers(1, 4), extra=st.integers(0, 5)
)
def test_the_ranks_shares_are_the_whole_step(rows, accumulate, ranks, extra):
    """Over any rows: what the ranks get at one position of the loader, put together over a step, is the step."""
    micro_batches = accumulate * ranks
    rows += micro_batches
    steps = build_batch_schedule(
        [3] * rows, [1] * rows, batch_size=micro_batches + extra, micro_batches=micro_batches, seed=0
    )
    table = SimpleNamespace(
        batch=lambda rows, train_on, all_candidates, line: {"rows": rows, "all_candidates": all_candidates}
    )
    shares = [TrainingBatches(table, steps, "all", ranks=ranks, rank=rank) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(steps) * accumulate}
    for number, step in enumerate(steps):
        items = [share[number * accumulate + k]["rows"] for share in shares for k in range(accumulate)]
        assert all(items)
        assert not any(share[number * accumulate]["all_candidates"] for share in shares)
        assert sorted(row for item in items for row in item) == sorted(
            row for m in step.micro_batches for row in m
        )


@pytest.mark.parametrize(("ranks", "accumulate", "least"), [(1, 4, 4), (2, 2, 4), (3, 1, 3)])
def test_batch_size_below_accumulation_times_processes(ranks, accumulate, least, make_all):
    module = make_all(20, ranks=ranks, accumulate=accumulate, batch_size=least - 1)[0]
    message = f"data.batch_size: {least - 1} rows.*accumulate_grad_batches {accumulate} × {ranks} proc.*at least {least}"
    with pytest.raises(ConfigError, match=message):
        module.train_dataloader()
    assert len(make_all(20, ranks=ranks, accumulate=accumulate, batch_size=least)[0].train_dataloader()) > 0


@pytest.mark.parametrize(("limit", "told"), [(3, "3"), (0.3, "5")])
def test_a_limit_in_the_middle_of_a_step(limit, told, make_all):
    """The loss of such a step would be divided by the totals of the whole one."""
    module = make_all(36, accumulate=2, batch_size=4, limit=limit)[0]
    with pytest.raises(
        ConfigError,
        match=rf"trainer\.limit_train_batches: {limit} .* ends an epoch behind {told} micro-batches",
    ):
        module.train_dataloader()
    assert (
        make_all(36, accumulate=2, batch_size=4, limit=4)[0].train_dataloader().micro_batches_per_epoch == 4
    )
    assert (
        make_all(36, accumulate=2, batch_size=4, limit=50)[0].train_dataloader().micro_batches_per_epoch == 18
    )


def test_too_few_rows_for_one_step(make_all):
    with pytest.raises(ConfigError, match=r"data\.train: 3 rows cannot fill 4 micro-batches"):
        make_all(3, accumulate=4, batch_size=8)[0].train_dataloader()


# --- validation ---


@pytest.mark.parametrize("count", [5, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_over_all_ranks(count, ranks, make_all):
    together = _epoch(
        make_all(count, ranks=ranks, eval_batch_size=2, stage="validate"), "val"
    )  # zip is strict
    ids = Counter(_ids(batch for batches in together for batch in batches))
    assert {i: n for i, n in ids.items() if i >= 0} == {i: 1 for i in range(count)}
    for batch in (batch for batches in together for batch in batches):
        assert batch["answer_ids"].tolist() == batch["gold_ids"].tolist()
        assert 1 <= len(batch["example_ids"]) <= 2


def test_a_rank_without_rows_gets_one_that_counts_for_nothing(make_all):
    """5 rows, 2 ranks, 2 rows a batch: 2 + 2 and 1 + 0."""
    together = _epoch(make_all(5, ranks=2, eval_batch_size=2, stage="validate", train_on="all"), "val")
    assert [[len(_ids([b])) for b in batches] for batches in together] == [[2, 2], [1, 1]]
    filler = together[1][1]
    assert filler["example_ids"].tolist() == [-1]
    assert (filler["labels"] == IGNORE_INDEX).all()
    assert filler["step_supervised_tokens"] == 0
    assert -1 not in _ids([together[1][0], *together[0]])


@pytest.mark.parametrize("ranked", [True, False])
def test_validation_begins_with_the_longest(ranked, make_all):
    """The longest of what is computed: of right answers, or of all candidates."""
    (module,) = make_all(
        9, eval_batch_size=1, stage="validate", answer_format="content", rank_validation=ranked
    )
    widths = [batch["input_ids"].shape[1] for batch in module.val_dataloader()]
    assert len(set(widths)) > 3
    assert widths == sorted(widths, reverse=True)
    table = list(module.tables["validation"])
    by_longest = sorted(table, key=lambda row: -max(row["lengths"]))
    assert by_longest != sorted(
        table, key=lambda row: -row["lengths"][row["gold"]]
    )  # the case is the one meant


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_ranked_validation_holds_every_candidate(train_on, make_all):
    (module,) = make_all(5, eval_batch_size=4, stage="validate", train_on=train_on, rank_validation=True)
    batches = list(module.val_dataloader())
    assert all(batch["all_candidates_present"] for batch in batches)
    assert Counter(_candidates(batches)) == Counter(
        (row, answer) for row in range(5) for answer in range(2 + row % 3)
    )
    for batch in batches:
        targets = batch["attention_mask"].sum(1) - 1 if train_on == "all" else batch["response_mask"].sum(1)
        assert (batch["labels"] != IGNORE_INDEX).sum(1).tolist() == targets.tolist()


def test_validation_of_right_answers_holds_no_whole_questions(make_all):
    (module,) = make_all(5, stage="fit", batch_size=4)
    assert not any(
        batch["all_candidates_present"] for batch in [*module.val_dataloader(), *module.train_dataloader()]
    )


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_validation_targets_are_those_of_training(train_on, make_all):
    (module,) = make_all(6, stage="fit", train_on=train_on, batch_size=6, eval_batch_size=6)
    (train,), (validation,) = list(module.train_dataloader()), list(module.val_dataloader())
    assert (
        _targets([train])
        == _targets([validation])
        == train["step_supervised_tokens"]
        == validation["step_supervised_tokens"]
    )


# --- test and predict ---


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("eval_batch_size", [1, 4])
def test_every_candidate_of_every_question_once(ranks, eval_batch_size, stage, make_all):
    together = _epoch(make_all(7, ranks=ranks, eval_batch_size=eval_batch_size, stage=stage), stage)
    found = Counter()
    for batch in (batch for batches in together for batch in batches):
        for example, answer, gold in zip(
            batch["example_ids"], batch["answer_ids"], batch["gold_ids"], strict=True
        ):
            if example >= 0:
                found[int(example), int(answer)] += 1
                assert int(gold) == int(example) % (2 + int(example) % 3)
    assert found == Counter((row, answer) for row in range(7) for answer in range(2 + row % 3))


OPTIONS = [2, 5, 3, 4, 2, 5, 4, 2, 3, 2, 2]  # candidates of each question


@pytest.fixture
def make_mixed(make_data, write):
    """``make_mixed(2, …)``: one data module per rank over questions with 2, 3, 4 and 5 candidates, mixed."""

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
def test_evaluation_batches_hold_whole_questions(ranks, eval_batch_size, questions, make_mixed):
    """A question is never torn apart, even where it alone is more than ``eval_batch_size``."""
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


def test_characters_are_those_of_the_candidates_text(make_mixed):
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


def test_a_rank_without_questions_gets_one_row_that_counts_for_nothing(make_mixed):
    """11 questions, 2 a batch, 4 ranks: 6 batches, so two ranks have one more than the others."""
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
    """What is computed together, in order of the batches: example ids of every batch that counts."""
    loaders = [list(module.test_dataloader()[index]) for module in modules]
    batches = [batch for together in zip(*loaders, strict=True) for batch in together]
    return [ids for ids in (list(dict.fromkeys(_ids([batch]))) for batch in batches) if ids != [-1]]


@pytest.mark.parametrize("kind", ["likelihood", "generation"])
def test_what_is_computed_together_does_not_depend_on_ranks_or_interruptions(kind, make_mixed):
    settings = {"evaluate_by": [kind], "eval_batch_size": 10 if kind == "likelihood" else 2}
    whole = _compositions(make_mixed(1, **settings))
    assert [len(ids) for ids in whole] == [2, 2, 2, 2, 2, 1]
    assert _compositions(make_mixed(3, **settings)) == whole
    done = {*whole[0], *whole[3], whole[4][1]}
    modules = make_mixed(2, **settings)
    for module in modules:
        module.answered[kind] = done
    assert _compositions(modules) == [whole[1], whole[2], whole[4][:1], whole[5]]


def test_each_way_of_evaluating_has_its_own_answers(make_mixed):
    (module,) = make_mixed(evaluate_by=["generation", "likelihood"], eval_batch_size=5)
    module.answered = {"likelihood": set(range(9)), "generation": {10}}
    prompts, questions = _compositions([module]), _compositions([module], 1)
    assert sorted(i for ids in prompts for i in ids) == list(range(10))
    assert sorted(i for ids in questions for i in ids) == [9, 10]


def test_validation_never_skips_what_a_test_has_answered(make_all):
    (module,) = make_all(4, stage="validate")
    module.answered["likelihood"] = {0, 1, 2, 3}
    assert sorted(_ids(module.val_dataloader())) == [0, 1, 2, 3]


def test_nothing_left_to_evaluate(make_mixed):
    for module in make_mixed(2, evaluate_by=["likelihood", "generation"]):
        module.answered = {"likelihood": set(range(11)), "generation": set(range(11))}
        for loader in module.test_dataloader():
            assert [batch["example_ids"].tolist() for batch in loader] == [[-1]]


# --- prompts to complete ---


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", ["test", "predict"])
def test_every_prompt_once(ranks, stage, make_mixed, tokenizer):
    modules = make_mixed(ranks, evaluate_by=["generation"], eval_batch_size=4, stage=stage)
    prompts = {row["example"]: row["prompt"] for row in modules[0].tables["test"]}
    found = {}
    for batch in (batch for batches in _epoch(modules, stage) for batch in batches):
        assert len(batch["example_ids"]) <= 4
        assert batch["attention_mask"][:, -1].all()  # every row's next token stands in the same column
        assert (batch["pad_id"], batch["eos_id"]) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
        for ids, real, example in zip(
            batch["input_ids"], batch["attention_mask"], batch["example_ids"], strict=True
        ):
            if example >= 0:
                assert int(example) not in found
                found[int(example)] = ids[real.bool()].tolist()
    assert found == prompts


def test_prompts_begin_with_the_longest(make_mixed):
    (module,) = make_mixed(evaluate_by=["generation"], eval_batch_size=1)
    widths = [batch["input_ids"].shape[1] for batch in module.test_dataloader()[0]]
    assert len(set(widths)) > 1
    assert widths == sorted(widths, reverse=True)


def test_no_prompts_give_one_that_counts_for_nothing(make_mixed):
    table = TokenTable(make_mixed()[0].tables["test"], pad_id=5, eos_id=6)
    batch = table.prompts([])
    assert batch["example_ids"].tolist() == [-1]
    assert batch["attention_mask"].all()
    assert batch["input_ids"].shape[1] > 1  # a model cannot begin with nothing
    assert (batch["pad_id"], batch["eos_id"]) == (5, 6)
    assert table.prompts([3, 1])["example_ids"].tolist() == [3, 1]


def test_a_loader_for_each_way_of_evaluating_in_the_order_given(make_mixed):
    for ways in (["likelihood", "generation"], ["generation", "likelihood"], ["generation"], ["likelihood"]):
        (module,) = make_mixed(evaluate_by=ways)
        kinds = [
            "likelihood" if "labels" in next(iter(loader)) else "generation"
            for loader in module.test_dataloader()
        ]
        assert kinds == ways


def test_evaluation_with_workers_draws_nothing_from_the_global_generator(make_mixed):
    """And gives the same batches."""
    (alone,), (helped,) = (
        make_mixed(evaluate_by=["likelihood", "generation"], num_workers=n) for n in (0, 2)
    )
    before = torch.get_rng_state()
    for here, there in zip(alone.test_dataloader(), helped.test_dataloader(), strict=True):
        for one, other in zip(here, there, strict=True):
            assert {name: torch.as_tensor(value).tolist() for name, value in one.items()} == {
                name: torch.as_tensor(value).tolist() for name, value in other.items()
            }
    assert torch.equal(torch.get_rng_state(), before)


def test_candidates_compete_by_their_own_tokens_whatever_is_trained(make_all):
    (module,) = make_all(3, stage="test", train_on="all", answer_format="content")
    for (batch,) in _epoch([module], "test"):
        assert (batch["labels"] != IGNORE_INDEX).equal(batch["response_mask"])


def test_candidates_of_one_question_share_the_prompt(make_all):
    """Even where the longest one has shortened it."""
    (module,) = make_all(7, stage="test", answer_format="content", max_length=40)
    prompts = {}
    for (batch,) in _epoch([module], "test"):
        for ids, real, answer, example in zip(
            batch["input_ids"],
            batch["attention_mask"].bool(),
            batch["response_mask"],
            batch["example_ids"],
            strict=True,
        ):
            prompts.setdefault(int(example), set()).add(tuple(ids[real & ~answer].tolist()))
    assert any(module.tables["test"]["truncated"])
    assert {example: len(found) for example, found in prompts.items()} == {example: 1 for example in range(7)}


def test_the_table_names_the_task_of_every_row(make_data, write, rows):
    sources = [write("zoo.json", rows(2)), write("art.json", rows(3))]
    module = make_data(test=sources, stage="test")
    assert module.tables["test"]["task"][:] == ["zoo", "zoo", "art", "art", "art"]
    assert module.tables["test"]["example"][:] == [0, 1, 2, 3, 4]


# --- the cache ---


def test_the_second_set_up_tokenises_nothing(tokenised, make_all):
    (first,) = make_all(5, stage="test")
    assert len(tokenised) == 5
    (second,) = make_all(5, stage="test")
    assert len(tokenised) == 5
    assert first.tables["test"].to_dict() == second.tables["test"].to_dict()


def test_preparing_and_setting_up_tokenise_once(tokenised, make_all):
    (module,) = make_all(5, stage=None, validation=1)
    module.trainer = None
    module.prepare_data()
    module.setup("fit")
    assert len(tokenised) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 50},
        {"template": "plain"},
        {"answer_format": "content"},
        {"template": "chat", "tokenizer": "gemma"},
        {"tokenizer": "plain"},
        {"tokenizer": "closing"},
        {"tokenizer": "pieces"},
    ],
    ids=str,
)
def test_whatever_changes_tokens_tokenises_again(
    change, tokenised, make_all, tokenizers_by_kind, chat_tokenizers
):
    make_all(5, stage="test")
    if "tokenizer" in change:
        change = change | {"tokenizer": (tokenizers_by_kind | chat_tokenizers)[change["tokenizer"]]}
    make_all(5, stage="test", **change)
    assert len(tokenised) == 10
    make_all(5, stage="test", **change)
    assert len(tokenised) == 10


def test_another_row_tokenises_again(tokenised, make_all):
    make_all(5, stage="test")
    make_all(6, stage="test")
    assert len(tokenised) == 11


@pytest.mark.parametrize(
    "change",
    [
        {"train_on": "all"},
        {"seed": 4},
        {"batch_size": 2},
        {"eval_batch_size": 2},
        {"num_workers": 2},
        {"evaluate_by": ["generation"]},
    ],
    ids=str,
)
def test_what_changes_no_token_reads_the_cache(change, tokenised, make_all):
    make_all(5, stage="test")
    make_all(5, stage="test", **change)
    assert len(tokenised) == 5


def test_an_interrupted_tokenisation_leaves_nothing_behind(make_all, monkeypatch):
    original, calls = tables.tokenize_example, []

    def fail_at_the_fourth(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(tables, "tokenize_example", fail_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        make_all(5, stage="test")
    (module,) = make_all(5, stage="test")
    assert module.tables["test"]["example"][:] == [0, 1, 2, 3, 4]


def test_another_tokenizer_replaces_open_tables(make_all, tokenizers_by_kind):
    """One data module used for two backbones must not feed the second one the first one's ids."""
    (module,) = make_all(3, stage="test")
    module.connect(tokenizers_by_kind["pieces"])
    module.setup("test")
    (fresh,) = make_all(3, stage="test", tokenizer=tokenizers_by_kind["pieces"])
    assert module.tables["test"]["prompt"][:] == fresh.tables["test"]["prompt"][:]


# --- messages ---


def test_an_answer_that_leaves_no_room_names_split_and_row(make_all):
    with pytest.raises(
        ConfigError, match=r"data\.train, example 0 \('Below is.*an answer has \d+ tokens.*max_length 5"
    ):
        make_all(3, max_length=5)


def test_shortened_prompts_are_counted_in_the_log(make_all, caplog):
    with caplog.at_level(logging.WARNING):
        make_all(5, stage="test", max_length=40)
        make_all(5, stage="test", max_length=512)
    assert [record.getMessage() for record in caplog.records] == [
        "test: 5 of 5 prompts were truncated to fit max_length 40"
    ]


def test_no_tokenizer(make_data):
    module = make_data()
    module.connect(None)
    with pytest.raises(RuntimeError, match=r"call connect\(tokenizer\) first"):
        module.setup("fit")


def test_a_family_must_give_examples():
    with pytest.raises(TypeError, match=r"abstract.*examples"):
        SupervisedDataModule()


class _Capitals(SupervisedDataModule):
    """A family of its own, with nothing but examples."""

    def examples(self, split):
        yield Example("What is the capital of France?\nAnswer:", [" Lyon", " Paris"], 1, "capitals")


def test_a_family_that_says_nothing_about_labels_is_read_by_its_answers(tokenizer):
    data = _Capitals(train_on="response", evaluate_by=["likelihood", "generation"])
    assert data.problems("test") == []
    data.connect(tokenizer)
    data.setup("test")
    (row,) = data.tables["test"]
    assert row["labels"] == [" Lyon", " Paris"]
    texts = (" paris.\nOr Lyon", "Lyon", "Nice", "")
    assert [data.parse_answer(text, row["labels"]).choice for text in texts] == [1, 0, None, None]


def test_at_exit_daemons_that_ignore_sigterm_are_ended_and_other_processes_are_waited_for(tmp_path):
    program = f"""
import multiprocessing, pathlib, time
from gatera_lightning.datamodules.batching.loader import ignore_signals

def deaf():
    ignore_signals(0)
    time.sleep(600)

def busy():
    time.sleep(1)
    pathlib.Path({str(tmp_path / "finished")!r}).touch()

fork = multiprocessing.get_context("fork")
fork.Process(target=deaf, daemon=True).start()
fork.Process(target=busy).start()
time.sleep(0.5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert (tmp_path / "finished").exists()
