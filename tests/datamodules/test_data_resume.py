"""A saved position continues exactly: the sampler's, the loader's, and the one that Lightning writes into checkpoints."""

import itertools
import logging

import lightning as L
import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from gatera_lightning.datamodules.plan import StepSampler

STEPS, ACCUMULATE = 5, 2
PER_EPOCH = STEPS * ACCUMULATE


def _sampler():
    return StepSampler(STEPS, ACCUMULATE, seed=3)


def _epochs(iterable, count):
    return [list(iterable) for _ in range(count)]


# --- the sampler alone ---


def _interrupted(epoch, position):
    """Of a run stopped in an epoch after some indices: what was done, the state, the rest, the two epochs after."""
    sampler = _sampler()
    _epochs(sampler, epoch)
    iterator = iter(sampler)
    done = [next(iterator) for _ in range(position)]
    return done, iterator.state_dict(), list(iterator), _epochs(sampler, 2)


def _resumed(state):
    """What a new process does from a state: the first epoch's indices and the two epochs after."""
    sampler = _sampler()
    iterator = iter(sampler)
    iterator.load_state_dict(state)
    return list(iterator), _epochs(sampler, 2)


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("position", range(PER_EPOCH))
def test_sampler_continues_at_any_position(epoch, position):
    done, state, rest, later = _interrupted(epoch, position)
    assert sorted(done + rest) == list(range(PER_EPOCH))
    assert _resumed(state) == (rest, later)


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_end_of_an_epoch_continues_with_the_next(epoch):
    """Lightning has no use for an iterator that is at its end."""
    _, state, rest, later = _interrupted(epoch, PER_EPOCH)
    first, (second, _) = _resumed(state)
    assert rest == []
    assert [first, second] == later


def test_iterators_that_nobody_uses_do_not_count():
    """Loaders and trainers call ``iter()`` at will; an epoch begins with its first index."""
    sampler, other = _sampler(), _sampler()
    orders = []
    for _ in range(3):
        iter(other)
        orders.append(list(other))
        iter(other)
    assert orders == _epochs(sampler, 3)


def test_a_state_does_not_change_afterwards():
    iterator = iter(_sampler())
    first = next(iterator)
    state = iterator.state_dict()
    rest = list(iterator)
    resumed = iter(_sampler())
    resumed.load_state_dict(state)
    assert [first, *resumed] == [first, *rest]


# --- through the loader ---


class _Indices(torch.utils.data.Dataset):
    def __len__(self):
        return PER_EPOCH

    def __getitem__(self, index):
        return index


def _loader(workers):
    generator = torch.Generator().manual_seed(0)
    return StatefulDataLoader(_Indices(), batch_size=None, sampler=_sampler(), num_workers=workers, generator=generator)


def _continues(workers, epoch, position):
    loader = _loader(workers)
    _epochs(loader, epoch)
    iterator = iter(loader)
    done = list(itertools.islice(iterator, position))
    state = loader.state_dict()
    rest, later = list(iterator), _epochs(loader, 2)
    assert sorted(done + rest) == list(range(PER_EPOCH))

    other = _loader(workers)
    other.load_state_dict(state)
    assert _epochs(other, 2) == ([rest, later[0]] if rest else later)


@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("position", range(PER_EPOCH + 1))
def test_loader_continues_at_any_position(epoch, position):
    _continues(0, epoch, position)


@pytest.mark.parametrize(("epoch", "position"), [(0, 0), (0, 3), (1, 1), (1, PER_EPOCH), (2, 4)])
def test_loader_with_workers_continues(epoch, position):
    """Workers fetch ahead: the position is what was handed out, not what was asked for."""
    _continues(2, epoch, position)


def test_workers_do_not_change_the_order():
    assert _epochs(_loader(2), 3) == _epochs(_loader(0), 3)


def test_asking_for_the_state_changes_nothing():
    loader = _loader(0)
    loader.state_dict()
    orders = []
    for _ in range(3):
        orders.append([index for index in loader if loader.state_dict()])
        loader.state_dict()
    assert orders == _epochs(_loader(0), 3)


def test_loader_state_survives_a_checkpoint(tmp_path):
    """It holds nothing that needs unpickling."""
    loader = _loader(0)
    iterator = iter(loader)
    next(iterator)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    other = _loader(0)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert list(other) == list(iterator)


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
        self.seen.append((self.current_epoch, tuple(batch["example_ids"].tolist()), batch["step_targets"]))
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
def fit(make_data, write, rows):
    """``fit(workers)``: a run's witness; with ``save`` it writes checkpoints, with ``resume`` it starts from one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
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
    "last batch": ["step-3", "step-6"],  # every_n_train_steps hits it whenever it divides the steps of an epoch
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
