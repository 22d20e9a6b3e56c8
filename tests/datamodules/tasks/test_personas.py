"""Which dialogues have the same persona, and rows that are held out together."""

import itertools
import random

import numpy as np
import pytest

from gatera_lightning.datamodules.batching.holdout import held_out_rows
from gatera_lightning.datamodules.tasks.personas import persona_numbers, persona_pairs, shared_personas

# --- personas ---


@pytest.mark.parametrize(
    ("personas", "numbers"),
    [
        ([], []),
        (["ab", "ab"], [0, 0]),
        (["ab", "ba", "cd"], [0, 0, 1]),
        (["abc", "cde", "bcx"], [0, 1, 0]),
        (["cd", "ab", "efg", "bcd", "gfa"], [0, 1, 2, 0, 2]),
        (["abcd", "efgh", "xydy", "cdef", "ghij"], [0, 0, 1, 0, 0]),  # one joins the others
        (["ab", "cd", "ef", "gh", "abgh", "cdef", "bxcy", "bc"], [0, 1, 1, 0, 0, 1, 2, 2]),
        (["a", "a", "ab", "b"], [0, 0, 1, 2]),  # one sentence is all that these have
        (["", "", "a"], [0, 1, 2]),
        (["aab", "aac"], [0, 1]),
    ],
)
def test_two_sentences_in_common(personas, numbers):
    assert persona_numbers([list(persona) for persona in personas]) == numbers


def test_case_and_white_space_do_not_count():
    assert persona_numbers([["I have a dog .", "me"], ["ME ", "i have  a dog ."]]) == [0, 0]


def test_numbers_are_the_connected_parts():
    """Against repeated merging of whole sets."""
    draw = random.Random(3)
    for _ in range(30):
        personas = [draw.sample("abcdefghijklmnopqrst", draw.randint(1, 4)) for _ in range(25)]
        parts = [{k} for k in range(len(personas))]
        for one, other in itertools.combinations(range(len(personas)), 2):
            if len(set(personas[one]) & set(personas[other])) >= 2 or (
                set(personas[one]) == set(personas[other])
            ):
                a = next(part for part in parts if one in part)
                b = next(part for part in parts if other in part)
                if a is not b:
                    parts.remove(b)
                    a |= b
        parts.sort(key=min)
        assert persona_numbers(personas) == [
            next(i for i, part in enumerate(parts) if k in part) for k in range(25)
        ]


def test_pairs():
    assert persona_pairs(["b", "A", "c"]) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert persona_pairs(["b"]) == {("b",)}
    assert persona_pairs([]) == set()


def test_shared_personas_are_said():
    trained = [list("abcd"), list("efgh")]
    found = shared_personas(trained, [list("abxy"), list("aexy"), list("hgf"), []], "test")
    assert found.rows == (0, 2)
    assert str(found).startswith(
        "leakage: 2 of 4 test dialogues have a persona that is trained on (numbers from 0: 0, 2). They stay in"
    )
    none = shared_personas(trained, [list("axyz")] * 1200, "validation")
    assert not none.rows
    assert str(none) == "leakage: none of the 1,200 validation dialogues has a persona that is trained on"
    assert "0, 1, 2, 3, 4, …)" in str(shared_personas(trained, [list("abc")] * 6, "test"))


# --- held out ---


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("seed", [0, 5])
def test_rows_without_groups_are_the_first_of_a_permutation(count, seed):
    order = np.random.default_rng(seed).permutation(count)
    for rows in {1, count // 2, count - 1} - {0}:
        assert np.flatnonzero(held_out_rows([""] * count, rows, seed)).tolist() == sorted(
            order[:rows].tolist()
        )


def test_groups_stay_together_and_are_enough():
    groups = [f"g{k % 5}" if k % 7 else "" for k in range(60)]
    drawn = set()
    for seed in range(20):
        held_out = held_out_rows(groups, 10, seed)
        chosen = {group or row for row, group in enumerate(groups) if held_out[row]}
        assert not chosen & {group or row for row, group in enumerate(groups) if not held_out[row]}
        assert 10 <= held_out.sum() < 10 + max(groups.count(f"g{k}") for k in range(5))
        drawn.add(tuple(held_out.tolist()))
    assert len(drawn) > 10


def test_a_group_more_is_not_taken():
    assert held_out_rows(["a", "a", "b", "b"], 2, 0).sum() == 2
    assert held_out_rows(["a", "a", "b", "b"], 3, 0).sum() == 4
