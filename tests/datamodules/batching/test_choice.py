"""Which training examples a run uses, in order; settings of the same effect have the same digest."""

import numpy as np
import pytest
from datasets import Dataset

from gatera_lightning.datamodules.batching.choice import choose_examples, indices_digest

TABLE = Dataset.from_dict({"task": ["a"] * 4 + ["b"] * 8, "group": [""] * 12})
BOTH = {"a": 1, "b": 1}


def choose(held_out=None, weights=None, seed=0):
    return choose_examples(TABLE, held_out=held_out, weights=weights, seed=seed)


def test_mixture_is_drawn_from_what_is_not_held_out():
    assert choose()["train"].tolist() == list(range(12))
    chosen = choose(held_out=3, weights=BOTH)
    assert not set(chosen["train"]) & set(chosen["validation"])
    assert len(chosen["validation"]) == 3
    assert len(chosen["train"]) == 9
    assert abs(np.sum(chosen["train"] < 4) - 4.5) == 0.5


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ({"weights": BOTH}, {"weights": {"a": 2, "b": 2.0}}, True),
        ({"weights": BOTH}, {"weights": {"a": 1, "b": 2}}, False),
        ({"weights": BOTH}, {"weights": BOTH, "seed": 1}, False),
        ({"held_out": 3}, {"held_out": 0.25}, True),
        ({"held_out": 3}, {}, False),
    ],
)
def test_digest_depends_on_the_effect(first, second, is_same):
    digests = [indices_digest(choose(**settings)["train"]) for settings in (first, second)]
    assert (digests[0] == digests[1]) == is_same
