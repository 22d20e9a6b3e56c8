"""Loaders: what each process gets in one epoch, and when tokens are read from the cache."""

import logging
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gatera_lightning.datamodules import base
from gatera_lightning.datamodules.base import SupervisedDataModule
from gatera_lightning.datamodules.batches import TrainingBatches
from gatera_lightning.datamodules.plan import plan_steps
from gatera_lightning.errors import ConfigError
from gatera_lightning.losses import IGNORE

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
        return [make_data(ranks=ranks, rank=rank, stage=stage, **(sources | options)) for rank in range(ranks)]

    return build


def _epoch(modules, split="train"):
    """All ranks' batches of one epoch, side by side: [batch][rank]."""
    loaders = [list(getattr(module, f"{split}_dataloader")()) for module in modules]
    return list(zip(*loaders, strict=True))


def _ids(batches):
    return [int(i) for batch in batches for i in batch["example_ids"]]


def _targets(batches):
    return sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)


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
        assert {batch["step_targets"] for batch in batches} == {_targets(batches)}
        assert {batch["step_tokens"] for batch in batches} == {_tokens(batches)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_totals_count_shortened_prompts_as_they_are(accumulate, make_all):
    modules = make_all(11, accumulate=accumulate, batch_size=4, max_length=40)
    assert any(modules[0].tables["train"]["shortened"])
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
        assert len({(batch["step_targets"], batch["step_tokens"]) for batch in batches}) == 1


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
        for ids, mask, example in zip(batch["input_ids"], batch["response_mask"], batch["example_ids"], strict=True):
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
        assert batch["step_targets"] == there[ids]["step_targets"]
        assert type(there[ids]["step_targets"]) is int


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(0, 40), accumulate=st.integers(1, 3), ranks=st.integers(1, 4), extra=st.integers(0, 5))
def test_the_ranks_shares_are_the_whole_step(rows, accumulate, ranks, extra):
    """Over any rows: what the ranks get at one position of the loader, put together over a step, is the step."""
    micro_batches = accumulate * ranks
    rows += micro_batches
    steps = plan_steps([3] * rows, [1] * rows, batch_size=micro_batches + extra, micro_batches=micro_batches, seed=0)
    table = SimpleNamespace(rows=[{"gold": 0}] * rows, batch=lambda pairs, train_on: {"rows": [row for row, _ in pairs]})
    shares = [TrainingBatches(table, steps, "all", ranks=ranks, rank=rank) for rank in range(ranks)]
    assert {len(share) for share in shares} == {len(steps) * accumulate}
    for number, step in enumerate(steps):
        items = [share[number * accumulate + k]["rows"] for share in shares for k in range(accumulate)]
        assert all(items)
        assert sorted(row for item in items for row in item) == sorted(row for m in step.micro_batches for row in m)


@pytest.mark.parametrize(("ranks", "accumulate", "least"), [(1, 4, 4), (2, 2, 4), (3, 1, 3)])
def test_batch_size_below_accumulation_times_processes(ranks, accumulate, least, make_all):
    module = make_all(20, ranks=ranks, accumulate=accumulate, batch_size=least - 1)[0]
    message = f"data.batch_size: {least - 1} rows.*accumulate_grad_batches {accumulate} × {ranks} proc.*at least {least}"
    with pytest.raises(ConfigError, match=message):
        module.train_dataloader()
    assert len(make_all(20, ranks=ranks, accumulate=accumulate, batch_size=least)[0].train_dataloader()) > 0


def test_too_few_rows_for_one_step(make_all):
    with pytest.raises(ConfigError, match=r"data\.train: 3 rows cannot fill 4 micro-batches"):
        make_all(3, accumulate=4, batch_size=8)[0].train_dataloader()


# --- validation ---


@pytest.mark.parametrize("count", [5, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_validation_over_all_ranks(count, ranks, make_all):
    together = _epoch(make_all(count, ranks=ranks, eval_batch_size=2, stage="validate"), "val")  # zip is strict
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
    assert (filler["labels"] == IGNORE).all()
    assert filler["step_targets"] == 0
    assert -1 not in _ids([together[1][0], *together[0]])


def test_validation_begins_with_the_longest(make_all):
    (module,) = make_all(9, eval_batch_size=2, stage="validate")
    widths = [batch["input_ids"].shape[1] for batch in module.val_dataloader()]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_validation_targets_are_those_of_training(train_on, make_all):
    (module,) = make_all(6, stage="fit", train_on=train_on, batch_size=6, eval_batch_size=6)
    (train,), (validation,) = list(module.train_dataloader()), list(module.val_dataloader())
    assert _targets([train]) == _targets([validation]) == train["step_targets"] == validation["step_targets"]


# --- test and predict ---


@pytest.mark.parametrize("stage", ["test", "predict"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("eval_batch_size", [1, 4])
def test_every_candidate_of_every_question_once(ranks, eval_batch_size, stage, make_all):
    together = _epoch(make_all(7, ranks=ranks, eval_batch_size=eval_batch_size, stage=stage), stage)
    found = Counter()
    for batch in (batch for batches in together for batch in batches):
        for example, answer, gold in zip(batch["example_ids"], batch["answer_ids"], batch["gold_ids"], strict=True):
            if example >= 0:
                found[int(example), int(answer)] += 1
                assert int(gold) == int(example) % (2 + int(example) % 3)
    assert found == Counter((row, answer) for row in range(7) for answer in range(2 + row % 3))


def test_candidates_compete_by_their_own_tokens_whatever_is_trained(make_all):
    (module,) = make_all(3, stage="test", train_on="all", answer_format="content")
    for batch in module.test_dataloader():
        assert (batch["labels"] != IGNORE).equal(batch["response_mask"])


def test_candidates_of_one_question_share_the_prompt(make_all):
    """Even where the longest one has shortened it."""
    (module,) = make_all(7, stage="test", answer_format="content", max_length=40)
    prompts = {}
    for batch in module.test_dataloader():
        for ids, real, answer, example in zip(
            batch["input_ids"], batch["attention_mask"].bool(), batch["response_mask"], batch["example_ids"], strict=True
        ):
            prompts.setdefault(int(example), set()).add(tuple(ids[real & ~answer].tolist()))
    assert any(module.tables["test"]["shortened"])
    assert {example: len(found) for example, found in prompts.items()} == {example: 1 for example in range(7)}


def test_tasks_are_numbered_by_name(make_data, write, rows):
    sources = [write("zoo.json", rows(2)), write("art.json", rows(3))]
    module = make_data(test=sources, stage="test")
    assert module.task_names == ["art", "zoo"]
    tasks = {}
    for batch in module.test_dataloader():
        tasks |= dict(zip(batch["example_ids"].tolist(), batch["task_ids"].tolist(), strict=True))
    assert tasks == {0: 1, 1: 1, 2: 0, 3: 0, 4: 0}


# --- the cache ---


@pytest.fixture
def tokenised(monkeypatch):
    """Prompts that were really tokenised, in order."""
    seen = []

    def spy(tokenizer, prompt, answers, max_length):
        seen.append(prompt)
        return original(tokenizer, prompt, answers, max_length)

    original = base.tokenise
    monkeypatch.setattr(base, "tokenise", spy)
    return seen


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
        {"tokenizer": "plain"},
        {"tokenizer": "closing"},
        {"tokenizer": "pieces"},
    ],
    ids=str,
)
def test_whatever_changes_tokens_tokenises_again(change, tokenised, make_all, tokenizers_by_kind):
    make_all(5, stage="test")
    if "tokenizer" in change:
        change = {"tokenizer": tokenizers_by_kind[change["tokenizer"]]}
    make_all(5, stage="test", **change)
    assert len(tokenised) == 10
    make_all(5, stage="test", **change)
    assert len(tokenised) == 10


def test_another_row_tokenises_again(tokenised, make_all):
    make_all(5, stage="test")
    make_all(6, stage="test")
    assert len(tokenised) == 11


@pytest.mark.parametrize("change", [{"train_on": "all"}, {"seed": 4}, {"batch_size": 2}, {"num_workers": 2}], ids=str)
def test_what_changes_no_token_reads_the_cache(change, tokenised, make_all):
    make_all(5, stage="test")
    make_all(5, stage="test", **change)
    assert len(tokenised) == 5


def test_an_interrupted_tokenisation_leaves_nothing_behind(make_all, monkeypatch):
    original, calls = base.tokenise, []

    def fail_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(base, "tokenise", fail_at_the_fourth)
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
    with pytest.raises(ConfigError, match=r"data\.train, example 0 \('Below is.*an answer has \d+ tokens.*max_length 5"):
        make_all(3, max_length=5)


def test_shortened_prompts_are_counted_in_the_log(make_all, caplog):
    with caplog.at_level(logging.WARNING):
        make_all(5, stage="test", max_length=40)
        make_all(5, stage="test", max_length=512)
    assert [record.getMessage() for record in caplog.records] == ["test: 5 of 5 prompts lost their beginning to max_length 40"]


def test_no_tokenizer(make_data):
    module = make_data()
    module.connect(None)
    with pytest.raises(RuntimeError, match=r"call connect\(tokenizer\) first"):
        module.setup("fit")


def test_a_family_must_give_examples():
    with pytest.raises(TypeError, match=r"abstract.*examples"):
        SupervisedDataModule()
