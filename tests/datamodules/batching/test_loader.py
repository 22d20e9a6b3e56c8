"""The training loader: the order of steps, and positions that are restored, also by Lightning."""

import itertools
import logging
import time

import lightning as L
import pytest
import torch
from torch import nn

from gatera_lightning.datamodules.batching import workers
from gatera_lightning.datamodules.batching.loader import ResumableLoader, evaluation_loader
from gatera_lightning.errors import CheckpointError

STEPS, ACCUMULATE = 5, 2
PER_EPOCH = STEPS * ACCUMULATE


class _Indices(torch.utils.data.Dataset):
    """Stands in for training batches: item ``i`` is ``i``."""

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


# --- order ---


def _step_order(indices, accumulate):
    """The steps in the order of an epoch; asserts that the micro-batches of each step are in order."""
    chunks = [indices[i : i + accumulate] for i in range(0, len(indices), accumulate)]
    assert all(
        chunk == list(range(chunk[0], chunk[0] + accumulate)) and chunk[0] % accumulate == 0
        for chunk in chunks
    )
    return [chunk[0] // accumulate for chunk in chunks]


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_epoch_yields_every_step_once_with_micro_batches_in_order(accumulate):
    loader = _loader(9, accumulate)
    for epoch in _epochs(loader, 3):
        assert len(epoch) == len(loader) == 9 * accumulate
        assert sorted(_step_order(epoch, accumulate)) == list(range(9))


def test_epochs_differ():
    orders = _epochs(_loader(20), 4)
    assert len(set(map(tuple, orders))) == 4


def test_first_epoch_is_shuffled():
    assert _step_order(list(_loader(20)), ACCUMULATE) != list(range(20))


def test_order_depends_on_seed():
    orders = _epochs(_loader(20, seed=1), 3)
    assert _epochs(_loader(20, seed=1), 3) == orders
    assert all(other != order for other, order in zip(_epochs(_loader(20, seed=2), 3), orders, strict=True))


def test_order_ignores_global_generator():
    torch.manual_seed(1)
    first = list(_loader(20))
    torch.manual_seed(2)
    assert list(_loader(20)) == first


def test_epoch_leaves_global_generator_unchanged():
    """Otherwise dropout would differ in resumed runs."""
    before = torch.get_rng_state()
    _epochs(_loader(), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_order_does_not_depend_on_workers():
    assert _epochs(_loader(workers=2), 3) == _epochs(_loader(), 3)


def test_unused_iterators_do_not_start_an_epoch():
    """Trainers call ``iter()`` at different times; an epoch starts with its first batch."""
    loader = _loader()
    orders = []
    for _ in range(3):
        iter(loader)
        orders.append(list(loader))
        iter(loader)
    assert orders == _epochs(_loader(), 3)


def test_interrupted_epoch_is_followed_by_the_next():
    """As with ``limit_train_batches``."""
    loader = _loader()
    heads = [list(itertools.islice(loader, 4)) for _ in range(3)]
    assert heads == [order[:4] for order in _epochs(_loader(), 3)]


@pytest.mark.parametrize("position", range(5))
def test_limited_epoch_resumes_exactly(position):
    """The Trainer ends each epoch after 4 of 10 micro-batches; the second one is interrupted."""
    uninterrupted = _loader(limit=4)
    _, *expected = [list(itertools.islice(uninterrupted, 4)) for _ in range(3)]
    loader = _loader(limit=4)
    list(itertools.islice(loader, 4))
    done = list(itertools.islice(loader, position))
    resumed = _loader(limit=4)
    resumed.load_state_dict(loader.state_dict())
    for length in ([4 - position] if 0 < position < 4 else []) + [4]:
        done += list(itertools.islice(resumed, length))
    assert done == list(itertools.chain(*expected))[: len(done)]


# --- position ---


def _assert_resumes(workers, epoch, position):
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
    )  # a loader at the end of an epoch starts the next one


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("position", range(PER_EPOCH + 1))
def test_loader_resumes_at_any_position(epoch, position):
    _assert_resumes(0, epoch, position)


@pytest.mark.parametrize(("epoch", "position"), [(0, 0), (0, 3), (1, 1), (1, PER_EPOCH), (2, 4)])
def test_loader_resumes_with_workers(epoch, position):
    """Workers prefetch, but only yielded micro-batches count."""
    _assert_resumes(2, epoch, position)


def test_loader_resumes_repeatedly():
    uninterrupted = [index for epoch in _epochs(_loader(), 3) for index in epoch]
    seen, state = [], _loader().state_dict()
    while len(seen) < len(uninterrupted):
        loader = _loader()
        loader.load_state_dict(state)
        seen += itertools.islice(loader, 3)
        state = loader.state_dict()
    assert seen == uninterrupted


def test_loader_rejects_position_in_another_schedule():
    with pytest.raises(
        CheckpointError, match=r"^the checkpoint has another batch schedule: its optimizer steps "
    ):
        _loader(steps=STEPS + 1).load_state_dict(_loader().state_dict())


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_loader_resumes_with_other_micro_batches(accumulate):
    loader = _loader()
    done = list(itertools.islice(iter(loader), 3 * ACCUMULATE))
    other = _loader(accumulate=accumulate)
    other.load_state_dict(loader.state_dict())
    rest = list(other)
    assert sorted(_step_order(done, ACCUMULATE) + _step_order(rest, accumulate)) == list(range(STEPS))
    uninterrupted = _loader(accumulate=accumulate)
    assert rest == list(uninterrupted)[3 * accumulate :]


def test_loader_rejects_position_within_a_step_of_other_micro_batches():
    loader = _loader()
    next(iter(loader))
    with pytest.raises(
        CheckpointError, match=r"after micro-batch 1 of 2 of a step; resume it with .* 2, not 1$"
    ):
        _loader(accumulate=1).load_state_dict(loader.state_dict())


def test_restored_position_survives_unused_iterators():
    loader = _loader()
    uninterrupted = _epochs(loader, 2)
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "steps": 3, "micro_batches": 0})
    iter(loader)
    assert _epochs(loader, 2) == [uninterrupted[0][6:], uninterrupted[1]]


def test_resumed_and_interrupted_epoch_is_followed_by_the_next():
    loader = _loader()
    uninterrupted = _epochs(loader, 2)
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "steps": 2, "micro_batches": 0})
    assert list(itertools.islice(loader, 2)) == uninterrupted[0][4:6]
    assert list(loader) == uninterrupted[1]


def test_state_dict_does_not_change_position():
    loader = _loader()
    loader.state_dict()
    orders = []
    for _ in range(3):
        orders.append([index for index in loader if loader.state_dict()])
        loader.state_dict()
    assert orders == _epochs(_loader(), 3)


def test_state_dict_loads_without_unpickling(tmp_path):
    loader = _loader()
    iterator = iter(loader)
    next(iterator)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    resumed = _loader()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert list(resumed) == list(iterator)


# --- in the data module ---


def _ids(batches):
    return [batch["example_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_module_restores_position(workers, make_data, write, rows):
    source = [write("rows.json", rows(EXAMPLES))]

    def data():
        settings = {"train": source, "validation": source, "batch_size": 4, "num_workers": workers}
        return make_data(accumulate=ACCUMULATE, stage="fit", **settings)

    assert data().state_dict() == {}
    uninterrupted, resumed = data(), data()
    loader = uninterrupted.train_dataloader()
    first = _ids(loader)
    iterator = iter(loader)
    head = _ids(itertools.islice(iterator, 3))
    state = uninterrupted.state_dict()
    tail, last = _ids(iterator), _ids(loader)
    assert sorted(map(str, first)) == sorted(map(str, head + tail)) == sorted(map(str, last))

    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    assert [_ids(loader), _ids(loader)] == [tail, last]
    assert _ids(resumed.train_dataloader()) == first  # the position applies to one loader only


def test_position_does_not_depend_on_rank(make_ranks):
    """Only rank 0's position is saved."""
    states = []
    for module in make_ranks(27, ranks=2, accumulate=2, batch_size=6):
        loader = module.train_dataloader()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        states.append(loader.state_dict())
    assert states[0] == states[1]


# --- in Lightning: runs resumed from every checkpoint equal the uninterrupted one ---

EPOCHS, EXAMPLES = 3, 11  # with batch_size 4: 3 optimizer steps per epoch, 2 micro-batches each


class _RecordExamples(L.LightningModule):
    """Trains one parameter and records the examples of every micro-batch."""

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


class _SaveAtEveryPoint(L.Callback):
    """Saves wherever ModelCheckpoint can: after a step, after validation, at the end of an epoch."""

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
    """``fit(workers)`` returns the examples of a run, which may save checkpoints or resume from one."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")
    source = [write("rows.json", rows(EXAMPLES))]

    def run(workers, *, validation=True, save=None, resume=None):
        module = _RecordExamples()
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
    "last batch": ["step-3", "step-6"],
    "after validation": ["validation-3", "validation-6"],
    "end of epoch": ["epoch-3", "epoch-6"],
}


def _assert_run_resumes(fit, tmp_path, workers, names, **options):
    save = _SaveAtEveryPoint(tmp_path)
    uninterrupted = fit(workers, save=save, **options)
    for epoch in range(EPOCHS):
        examples = [i for number, ids, _ in uninterrupted if number == epoch for i in ids]
        assert sorted(examples) == list(range(EXAMPLES))
    differing = {}
    for name in names:
        resumed = fit(workers, resume=str(tmp_path / f"{name}.ckpt"), **options)
        if resumed != uninterrupted[save.seen_at[name] :]:
            differing[name] = (
                f"{len(resumed)} micro-batches instead of {len(uninterrupted) - save.seen_at[name]}"
            )
    assert differing == {}


@pytest.mark.parametrize("saved", SAVED)
def test_run_resumes_exactly(saved, fit, tmp_path):
    _assert_run_resumes(fit, tmp_path, 0, SAVED[saved])


@pytest.mark.parametrize("saved", ["last batch", "end of epoch"])
def test_run_resumes_without_validation(saved, fit, tmp_path):
    _assert_run_resumes(fit, tmp_path, 0, SAVED[saved], validation=False)


@pytest.mark.slow
@pytest.mark.parametrize("saved", SAVED)
def test_run_resumes_with_workers(saved, fit, tmp_path):
    _assert_run_resumes(fit, tmp_path, 2, SAVED[saved][:2])


def test_run_does_not_depend_on_workers(fit):
    assert fit(0) == fit(0) == fit(2)


# --- workers ---


class _Stuck(_Indices):
    def __getitem__(self, index):
        time.sleep(60)


def test_worker_that_hangs_is_an_error(monkeypatch):
    monkeypatch.setattr(workers, "WORKER_TIMEOUT", 0.5)
    stuck = _Stuck(STEPS, ACCUMULATE)
    loaders = (
        ResumableLoader(stuck, seed=3, num_workers=1),
        evaluation_loader(stuck, seed=3, num_workers=1),
    )
    for loader in loaders:
        with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
            next(iter(loader))
