"""Random states are saved as they were restored until a batch uses them."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gatera_lightning.callbacks.rng_state import RNGState

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
