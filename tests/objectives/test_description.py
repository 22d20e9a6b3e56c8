"""Objectives are described by plain values: equal ones alike, and different ones not."""

import copy
import pickle
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gatera_lightning import Objective
from gatera_lightning.objectives.description import describe_objectives
from gatera_lightning.objectives.gate_entropy import GateEntropy
from gatera_lightning.objectives.next_token import NextToken


class Own(Objective):
    def __init__(self, value):
        self.value = value
        self._cache = object()

    def terms(self, model, batch, gates):
        return {}


@dataclass
class Inner:
    weight: float = 0.1
    layers: list = field(default_factory=list)


def test_classes_and_settings_have_names():
    assert describe_objectives([NextToken(), GateEntropy(0.2)]) == {
        "model.objectives": ["NextToken", "GateEntropy"],
        "model.objectives[1].weight": 0.2,
    }


DIFFERENT = {
    "number": (0.1, 0.2),
    "type": (1.5, "1.5"),
    "null": (None, 0),
    "text": ("a", "b"),
    "path": (Path("a"), Path("b")),
    "list": ([1, [2]], [1, [3]]),
    "length": ([1], [1, 1]),
    "order": ((1, 2), (2, 1)),
    "mapping": ({"a": {"b": 1}}, {"a": {"b": 2}}),
    "set": ({1, 2}, {1, 3}),
    "dataclass": (Inner(0.1), Inner(0.2)),
    "nested": ([Inner(layers=[1])], [Inner(layers=[2])]),
    "tensor": (torch.ones(2), torch.zeros(2)),
    "dtype": (torch.ones(2), torch.ones(2).bfloat16()),
    "shape": (torch.ones(2), torch.ones(1, 2)),
    "class": (torch.nn.ReLU(), torch.nn.GELU()),
    "function": (torch.relu, torch.sigmoid),
    "type_object": (Inner, Own),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_settings_have_different_descriptions(name):
    one, other = (describe_objectives([Own(value)]) for value in DIFFERENT[name])
    assert one.keys() == other.keys() == {"model.objectives", "model.objectives[0].value"}
    assert one != other


EQUAL = {
    "module": lambda: torch.nn.Linear(2, 2),
    "dataclass": Inner,
    "lambda": lambda: lambda x: x,
    "partial": lambda: partial(torch.relu),
    "tensor": lambda: torch.arange(4),
    "set": lambda: {"a", "b", "c"},
    "object": object,
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_settings_have_equal_descriptions_without_addresses(name):
    one, other = describe_objectives([Own(EQUAL[name]())]), describe_objectives([Own(EQUAL[name]())])
    assert one == other
    assert not re.search(r"0x[0-9a-f]{6}", str(one))


def test_description_survives_a_checkpoint(tmp_path):
    objectives = [Own(values[0]) for values in DIFFERENT.values()]
    torch.save(describe_objectives(objectives), tmp_path / "found.pt")
    assert torch.load(tmp_path / "found.pt", weights_only=True) == describe_objectives(objectives)


def test_object_that_contains_itself_ends():
    loop = [1]
    loop.append(loop)
    assert "model.objectives[0].value" in describe_objectives([Own(loop)])


class Loose(NextToken):
    """An objective with public attributes."""

    def __init__(self, **values):
        vars(self).update(values)


def settings_of(**values):
    found = describe_objectives([Loose(**values)])
    return {name.rpartition(".")[2]: value for name, value in found.items() if name != "model.objectives"}


def test_numbers_of_other_classes_become_plain():
    """A checkpoint would store them as pickled objects, which loading refuses."""
    found = settings_of(a=np.float64(0.5), b=np.float64("nan"))
    assert found["a"] == 0.5
    assert {type(value) for value in found.values()} == {float}


def test_devices_do_not_differ_between_ranks():
    assert settings_of(device="cuda:0") == settings_of(device="cuda:1")
    assert settings_of(device="cuda:0") != settings_of(device="left")


def test_large_containers_are_described_by_their_length():
    assert settings_of(values=dict.fromkeys(range(101), 0.0)) == {"values": "dict of 101 entries"}
    assert settings_of(values=list(range(100))) == {"values": list(range(100))}


class Counting(NextToken):
    """Stores its arguments under other names, and counts in public."""

    def __init__(self, scale, *, shift=1, **options):
        self._scale, self.moved = scale, shift
        self.options = options
        self.calls, self.seen = 0, []


@dataclass(slots=True)
class Slotted(Objective):
    weight: float
    calls: int = field(default=0, init=False)

    def terms(self, model, batch, gates):
        self.calls += 1
        return {}


def test_settings_are_what_the_constructor_was_given():
    """And neither counters, nor whatever else an objective remembers."""
    one = Counting(0.5, temperature=2)
    before = describe_objectives([one])
    assert before == {
        "model.objectives": ["Counting"],
        **{"model.objectives[0].scale": 0.5, "model.objectives[0].shift": 1},
        "model.objectives[0].temperature": 2,
    }
    one.calls += 3
    one.seen.append(1)
    assert describe_objectives([one]) == before
    assert describe_objectives([copy.deepcopy(one), pickle.loads(pickle.dumps(one))]) == describe_objectives(
        [Counting(0.5, temperature=2)] * 2
    )
    for other in (Counting(0.6, temperature=2), Counting(0.5, shift=2, temperature=2), Counting(0.5, heat=2)):
        assert describe_objectives([other]) != before


def test_attribute_of_an_argument_that_was_changed_counts():
    own = Own(1)
    own.value = 2
    assert describe_objectives([own]) == describe_objectives([Own(2)])


def test_dataclass_with_slots_is_described_by_its_arguments():
    one = Slotted(0.5)
    one.terms(None, None, None)
    assert describe_objectives([one])["model.objectives[0].weight"] == 0.5
    assert describe_objectives([one]) == describe_objectives([Slotted(0.5)])
