"""Random states are saved as they were restored until a batch uses them."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gatera_lightning.callbacks.rng_state import RNGState
from gatera_lightning.errors import CheckpointError

TRAINER = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True)


def draw():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()


def start(callback, trainer=TRAINER):
    callback.on_train_start(trainer, None)


def first_batch(callback, trainer=TRAINER):
    callback.on_train_batch_start(trainer, None, None, 0)


@pytest.fixture
def saved():
    """The states that a run saved, and what it drew next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        states = RNGState().state_dict()
        yield states, draw()


@pytest.mark.parametrize("starts", [0, 1, 3], ids=["loaded", "started", "started thrice"])
def test_states_that_no_batch_used_are_saved_unchanged(saved, starts):
    states, expected = saved
    for _ in range(starts):  # each a run that ends before its first batch
        callback = RNGState()
        callback.load_state_dict(states)
        start(callback)
        draw()
        states = callback.state_dict()
    callback = RNGState()
    callback.load_state_dict(states)
    draw()
    states = callback.state_dict()
    start(callback)
    first_batch(callback)
    assert draw() == expected
    again = RNGState()
    again.load_state_dict(states)
    start(again)
    first_batch(again)
    assert draw() == expected


def test_states_are_restored_once(saved):
    callback = RNGState()
    callback.load_state_dict(saved[0])
    start(callback)
    first_batch(callback)
    draw()
    later = torch.get_rng_state()
    first_batch(callback)
    assert torch.equal(torch.get_rng_state(), later)
    assert torch.equal(callback.state_dict()["ranks"][0]["torch"], later)


def test_states_of_other_ranks_are_not_restored(saved, caplog):
    callback = RNGState()
    callback.load_state_dict({"ranks": saved[0]["ranks"] * 2})
    start(callback)
    before = torch.get_rng_state()
    first_batch(callback)
    assert torch.equal(torch.get_rng_state(), before)
    assert "random states of 2 ranks, but this run has 1" in caplog.text
    assert len(callback.state_dict()["ranks"]) == 1


def test_states_of_an_evaluated_checkpoint_are_forgotten(saved):
    callback = RNGState()
    callback.load_state_dict(saved[0])
    callback.setup(TRAINER, None, "fit")
    start(callback)
    before = torch.get_rng_state()
    first_batch(callback)
    assert torch.equal(torch.get_rng_state(), before)


# --- several ranks ---


@pytest.fixture
def _same_torch_state_afterwards():
    with torch.random.fork_rng(devices=[]):
        yield


def _mask_of(rank, world_size, seed=3, resumed_from=None):
    """The first dropout mask that a rank draws in training."""
    torch.manual_seed(seed)
    callback = RNGState()
    if resumed_from is not None:
        callback.load_state_dict({"ranks": resumed_from})
    trainer = SimpleNamespace(global_rank=rank, world_size=world_size, is_global_zero=rank == 0)
    callback.on_train_start(trainer, None)
    callback.on_train_batch_start(trainer, None, None, 0)
    return torch.nn.functional.dropout(torch.ones(200), 0.5), callback.state_dict()["ranks"][0]


@pytest.mark.usefixtures("_same_torch_state_afterwards")
@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1, 2**63 - 1])
def test_masks_of_all_ranks_differ(seed):
    masks = [_mask_of(rank, 4, seed)[0] for rank in range(4)]
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    torch.manual_seed(seed)
    assert torch.equal(masks[0], torch.nn.functional.dropout(torch.ones(200), 0.5))


@pytest.mark.usefixtures("_same_torch_state_afterwards")
def test_ranks_of_neighboring_seeds_differ():
    masks = [_mask_of(rank, 3, seed)[0] for seed in (1, 2, 3) for rank in range(3)]
    assert len({tuple(mask.tolist()) for mask in masks}) == 9


@pytest.mark.usefixtures("_same_torch_state_afterwards")
def test_resumed_ranks_continue_their_own_states():
    states = [_mask_of(rank, 2)[1] for rank in range(2)]
    uninterrupted = []
    for rank in range(2):
        _mask_of(rank, 2)
        uninterrupted.append(torch.nn.functional.dropout(torch.ones(200), 0.5))
    resumed = [_mask_of(rank, 2, seed=9, resumed_from=states)[0] for rank in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(resumed, uninterrupted, strict=True))


@pytest.mark.usefixtures("_same_torch_state_afterwards")
def test_ranks_that_cannot_be_restored_differ():
    states = [_mask_of(rank, 2)[1] for rank in range(2)]
    masks = [_mask_of(rank, 3, resumed_from=states)[0] for rank in range(3)]
    assert len({tuple(mask.tolist()) for mask in masks}) == 3


@pytest.mark.parametrize("ranks", [None, "text", {}, [1], [{"torch": torch.get_rng_state()}]])
def test_state_of_another_type_is_named(ranks):
    entry = r"corrupt: its entry callbacks\.RNGState\.ranks(\[0\]\.numpy)? is .*; accepted: a "
    with pytest.raises(CheckpointError, match=entry):
        RNGState().load_state_dict({"ranks": ranks})
