"""The order of steps, and its saved position: the loader's, the data module's, and the one in Lightning's checkpoints."""

import itertools
import logging

import lightning as L
import pytest
import torch
from torch import nn

from gatera_lightning.datamodules.batching.loader import ResumableLoader
from gatera_lightning.errors import CheckpointError

STEPS, ACCUMULATE = 5, 2
PER_EPOCH = STEPS * ACCUMULATE


class _Indices(torch.utils.data.Dataset):
    """In place of training batches: item ``i`` is ``i``."""

    def __init__(self, steps, accumulate):
        self.steps, self.accumulate, self.fingerprint = steps, accumulate, f"{steps} steps"

    def __len__(self):
        return self.steps * self.accumulate

    def __getitem__(self, index):
        return index


def _loader(steps=STEPS, accumulate=ACCUMULATE, *, seed=3, workers=0, limit=None):
    return ResumableLoader(
        _Indices(steps, accumulate), seed=seed, num_workers=workers, micro_batches_per_epoch=limit
    )


def _epochs(loader, count):
    return [list(loader) for _ in range(count)]


# --- the order ---


def _steps_of(indices, accumulate):
    """The steps in the order of an epoch, having checked that each one's micro-batches come in order."""
    chunks = [indices[i : i + accumulate] for i in range(0, len(indices), accumulate)]
    assert all(
        chunk == list(range(chunk[0], chunk[0] + accumulate)) and chunk[0] % accumulate == 0
        for chunk in chunks
    )
    return [chunk[0] // accumulate for chunk in chunks]


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_micro_batches_of_a_step_come_in_order_and_every_step_once(accumulate):
    loader = _loader(9, accumulate)
    for epoch in _epochs(loader, 3):
        assert len(epoch) == len(loader) == 9 * accumulate
        assert sorted(_steps_of(epoch, accumulate)) == list(range(9))


def test_epochs_differ():
    orders = _epochs(_loader(20), 4)
    assert len(set(map(tuple, orders))) == 4


def test_the_first_epoch_is_shuffled():
    assert _steps_of(list(_loader(20)), ACCUMULATE) != list(range(20))


def test_loaders_of_one_seed_agree_in_every_epoch():
    whole = _epochs(_loader(20, seed=1), 3)
    assert _epochs(_loader(20, seed=1), 3) == whole
    assert all(other != order for other, order in zip(_epochs(_loader(20, seed=2), 3), whole, strict=True))


def test_the_order_is_its_own_whatever_the_global_generator_does():
    torch.manual_seed(1)
    first = list(_loader(20))
    torch.manual_seed(2)
    assert list(_loader(20)) == first


def test_an_epoch_draws_nothing_from_the_global_generator():
    """Dropout would differ between a run that was resumed and one that was not."""
    before = torch.get_rng_state()
    _epochs(_loader(), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_do_not_change_the_order():
    assert _epochs(_loader(workers=2), 3) == _epochs(_loader(), 3)


def test_iterators_that_nobody_uses_do_not_count():
    """Trainers call ``iter()`` at will; an epoch begins with its first batch."""
    loader = _loader()
    orders = []
    for _ in range(3):
        iter(loader)
        orders.append(list(loader))
        iter(loader)
    assert orders == _epochs(_loader(), 3)


def test_an_epoch_left_early_is_followed_by_the_next():
    """``limit_train_batches``"""
    loader = _loader()
    heads = [list(itertools.islice(loader, 4)) for _ in range(3)]
    assert heads == [order[:4] for order in _epochs(_loader(), 3)]


@pytest.mark.parametrize("position", range(5))
def test_a_limited_epoch_is_resumed_as_it_went_on(position):
    """The Trainer leaves every epoch behind four of ten batches; saved behind any of the second epoch, or at its start."""
    whole = _loader(limit=4)
    _, *expected = [list(itertools.islice(whole, 4)) for _ in range(3)]
    loader = _loader(limit=4)
    list(itertools.islice(loader, 4))
    done = list(itertools.islice(loader, position))
    resumed = _loader(limit=4)
    resumed.load_state_dict(loader.state_dict())
    for length in ([4 - position] if 0 < position < 4 else []) + [4]:
        done += list(itertools.islice(resumed, length))
    assert done == list(itertools.chain(*expected))[: len(done)]


# --- the position ---


def _continues(workers, epoch, position):
    loader = _loader(workers=workers)
    _epochs(loader, epoch)
    iterator = iter(loader)
    done = list(itertools.islice(iterator, position))
    state = loader.state_dict()
    rest, later = list(iterator), _epochs(loader, 2)
    assert sorted(done + rest) == list(range(PER_EPOCH))

    resumed = _loader(workers=workers)
    resumed.load_state_dict(state)
    assert _epochs(resumed, 2) == (
        [rest, later[0]] if rest else later
    )  # Lightning has no use for a loader at its end


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("position", range(PER_EPOCH + 1))
def test_it_continues_at_any_position(epoch, position):
    _continues(0, epoch, position)


@pytest.mark.parametrize(("epoch", "position"), [(0, 0), (0, 3), (1, 1), (1, PER_EPOCH), (2, 4)])
def test_it_continues_with_workers(epoch, position):
    """Workers fetch ahead: the position is what was handed out, not what was asked for."""
    _continues(2, epoch, position)


def test_a_resumed_loader_can_be_saved_again():
    whole = [index for epoch in _epochs(_loader(), 3) for index in epoch]
    seen, state = [], _loader().state_dict()
    while len(seen) < len(whole):
        loader = _loader()
        loader.load_state_dict(state)
        seen += itertools.islice(loader, 3)
        state = loader.state_dict()
    assert seen == whole


def test_a_position_in_other_steps_is_refused():
    with pytest.raises(
        CheckpointError, match=r"^the checkpoint's position is one in other optimizer steps: "
    ):
        _loader(steps=STEPS + 1).load_state_dict(_loader().state_dict())


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_position_means_the_same_at_another_cut(accumulate):
    loader = _loader()
    done = list(itertools.islice(iter(loader), 3 * ACCUMULATE))
    other = _loader(accumulate=accumulate)
    other.load_state_dict(loader.state_dict())
    rest = list(other)
    assert sorted(_steps_of(done, ACCUMULATE) + _steps_of(rest, accumulate)) == list(range(STEPS))
    whole = _loader(accumulate=accumulate)
    assert rest == list(whole)[3 * accumulate :]


def test_a_position_in_mid_step_holds_for_its_own_cut_alone():
    loader = _loader()
    next(iter(loader))
    with pytest.raises(
        CheckpointError, match=r"behind micro-batch 1 of 2 of a step; resume it with .* 2, not 1$"
    ):
        _loader(accumulate=1).load_state_dict(loader.state_dict())


def test_a_restored_position_survives_iterators_that_nobody_uses():
    loader = _loader()
    whole = _epochs(loader, 2)
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "steps": 3, "micro_batches": 0})
    iter(loader)
    assert _epochs(loader, 2) == [whole[0][6:], whole[1]]


def test_a_resumed_epoch_left_early_is_followed_by_the_next():
    loader = _loader()
    whole = _epochs(loader, 2)
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "steps": 2, "micro_batches": 0})
    assert list(itertools.islice(loader, 2)) == whole[0][4:6]
    assert list(loader) == whole[1]


def test_a_state_does_not_change_afterwards():
    loader = _loader()
    iterator = iter(loader)
    first = next(iterator)
    state = loader.state_dict()
    rest = list(iterator)
    resumed = _loader()
    resumed.load_state_dict(state)
    assert [first, *resumed] == [first, *rest]


def test_asking_for_the_state_changes_nothing():
    loader = _loader()
    loader.state_dict()
    orders = []
    for _ in range(3):
        orders.append([index for index in loader if loader.state_dict()])
        loader.state_dict()
    assert orders == _epochs(_loader(), 3)


def test_the_state_survives_a_checkpoint(tmp_path):
    """It holds nothing that needs unpickling."""
    loader = _loader()
    iterator = iter(loader)
    next(iterator)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    resumed = _loader()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert list(resumed) == list(iterator)


# --- through the data module ---


def _ids(batches):
    return [batch["example_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_data_module_hands_its_position_on(workers, make_data, write, rows):
    source = [write("rows.json", rows(ROWS))]

    def data():
        settings = {"train": source, "validation": source, "batch_size": 4, "num_workers": workers}
        return make_data(accumulate=ACCUMULATE, stage="fit", **settings)

    assert data().state_dict() == {}
    whole, resumed = data(), data()
    loader = whole.train_dataloader()
    first = _ids(loader)
    iterator = iter(loader)
    head = _ids(itertools.islice(iterator, 3))
    state = whole.state_dict()
    tail, last = _ids(iterator), _ids(loader)
    assert sorted(map(str, first)) == sorted(map(str, head + tail)) == sorted(map(str, last))

    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    assert [_ids(loader), _ids(loader)] == [tail, last]
    assert _ids(resumed.train_dataloader()) == first  # used once: another loader begins at the beginning


# --- through Lightning: the uninterrupted run against a run resumed from each of its checkpoints ---

EPOCHS, ROWS = 3, 11  # batch_size 4: 3 optimizer steps an epoch, 2 micro-batches each


class _Witness(L.LightningModule):
    """Trains one number and remembers which examples came when."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(
            (self.current_epoch, tuple(batch["example_ids"].tolist()), batch["step_supervised_tokens"])
        )
        return self.weight * 1.0

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _SaveEverywhere(L.Callback):
    """A checkpoint wherever ModelCheckpoint can write one: after a step, after validation, at an epoch's end."""

    def __init__(self, folder):
        self.folder, self.seen_at = folder, {}

    def _save(self, trainer, module, moment):
        name = f"{moment}-{trainer.global_step}"
        self.seen_at[name] = len(module.seen)
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % ACCUMULATE == 0:
            self._save(trainer, pl_module, "step")

    def on_validation_end(self, trainer, pl_module):
        self._save(trainer, pl_module, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, pl_module, "epoch")


@pytest.fixture
def fit(make_data, write, rows, caplog):
    """``fit(workers)``: a run's witness; with ``save`` it writes checkpoints, with ``resume`` it starts from one."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")  # of this test alone
    source = [write("rows.json", rows(ROWS))]

    def run(workers, *, validation=True, save=None, resume=None):
        module = _Witness()
        data = make_data(train=source, validation=source, batch_size=4, num_workers=workers, template="plain")
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            accumulate_grad_batches=ACCUMULATE,
            limit_val_batches=1 if validation else 0,
            num_sanity_val_steps=0,
            callbacks=[save] if save else [],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return module.seen

    return run


SAVED = {
    "mid-epoch": [f"step-{step}" for step in (1, 2, 4, 5, 7, 8)],
    "last batch": [
        "step-3",
        "step-6",
    ],  # every_n_train_steps hits it whenever it divides the steps of an epoch
    "after validation": ["validation-3", "validation-6"],
    "epoch's end": ["epoch-3", "epoch-6"],  # where ModelCheckpoint saves when there is no validation
}


def _resumes_exactly(fit, tmp_path, workers, names, **options):
    save = _SaveEverywhere(tmp_path)
    whole = fit(workers, save=save, **options)
    for epoch in range(EPOCHS):
        examples = [i for number, ids, _ in whole if number == epoch for i in ids]
        assert sorted(examples) == list(range(ROWS))
    differing = {}
    for name in names:
        resumed = fit(workers, resume=str(tmp_path / f"{name}.ckpt"), **options)
        if resumed != whole[save.seen_at[name] :]:
            differing[name] = f"{len(resumed)} micro-batches instead of {len(whole) - save.seen_at[name]}"
    assert differing == {}


@pytest.mark.parametrize("saved", SAVED)
def test_resume(saved, fit, tmp_path):
    _resumes_exactly(fit, tmp_path, 0, SAVED[saved])


@pytest.mark.parametrize("saved", ["last batch", "epoch's end"])
def test_resume_without_validation(saved, fit, tmp_path):
    _resumes_exactly(fit, tmp_path, 0, SAVED[saved], validation=False)


@pytest.mark.parametrize("saved", SAVED)
def test_resume_with_workers(saved, fit, tmp_path):
    _resumes_exactly(fit, tmp_path, 2, SAVED[saved][:2])


def test_runs_of_one_seed_agree_whatever_the_workers(fit):
    assert fit(0) == fit(0) == fit(2)
