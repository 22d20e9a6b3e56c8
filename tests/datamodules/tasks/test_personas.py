"""Which dialogues have the same persona, and which personas two splits share."""

import random
from itertools import combinations

import pytest

from gatera_lightning.datamodules.tasks.personas import find_persona_overlap, persona_ids, persona_pairs


def test_persona_pairs():
    assert persona_pairs(["b", "A", "c"]) == {("a", "b"), ("a", "c"), ("b", "c")}
    assert persona_pairs(["b"]) == {("b",)}
    assert persona_pairs([]) == set()


@pytest.mark.parametrize(
    ("personas", "ids"),  # a letter is a sentence
    [
        ([], []),
        (["ab", "ab"], [0, 0]),
        (["ab", "ba", "cd"], [0, 0, 1]),
        (["abc", "cde", "bcx"], [0, 1, 0]),
        (["cd", "ab", "efg", "bcd", "gfa"], [0, 1, 2, 0, 2]),
        (["abcd", "efgh", "xydy", "cdef", "ghij"], [0, 0, 1, 0, 0]),  # "cdef" connects the others
        (["ab", "cd", "ef", "gh", "abgh", "cdef", "bxcy", "bc"], [0, 1, 1, 0, 0, 1, 2, 2]),
        (["a", "a", "ab", "b"], [0, 0, 1, 2]),  # a single sentence
        (["", "", "a"], [0, 1, 2]),  # no sentence
        (["aab", "aac"], [0, 1]),  # a repeated sentence
    ],
)
def test_persona_ids(personas, ids):
    assert persona_ids([list(persona) for persona in personas]) == ids


def test_persona_ids_ignore_case_and_white_space():
    assert persona_ids([["I have a dog .", "me"], ["ME ", "i have  a dog ."]]) == [0, 0]


def test_persona_ids_are_connected_components():
    """Compared with merging sets until no two of them are connected."""
    draw = random.Random(3)
    for _ in range(30):
        personas = [draw.sample("abcdefghijklmnopqrst", draw.randint(1, 4)) for _ in range(25)]
        components = [{dialogue} for dialogue in range(len(personas))]
        for one, other in combinations(range(len(personas)), 2):
            first, second = set(personas[one]), set(personas[other])
            if len(first & second) >= 2 or first == second:
                a = next(component for component in components if one in component)
                b = next(component for component in components if other in component)
                if a is not b:
                    components.remove(b)
                    a |= b
        components.sort(key=min)
        assert persona_ids(personas) == [
            next(i for i, component in enumerate(components) if dialogue in component)
            for dialogue in range(25)
        ]


def test_persona_overlap_report():
    training = [list("abcd"), list("efgh")]
    overlap = find_persona_overlap(training, [list("abxy"), list("aexy"), list("hgf"), []], "test")
    assert overlap.indices == (0, 2)
    assert str(overlap).startswith(
        "train/test persona overlap: 2 of 4 test dialogues have a persona of train (indices 0, 2)."
    )
    overlap = find_persona_overlap(training, [list("abc")] * 6, "test")
    assert "(indices 0, 1, 2, 3, 4, …)" in str(overlap)
    overlap = find_persona_overlap(training, [list("axyz")] * 1200, "validation")
    assert not overlap.indices
    assert str(overlap) == "train/validation persona overlap: none of 1,200 validation dialogues"
