"""What ``import gatera_lightning`` offers, what it does not load, and names of version 0.1."""

import ast
import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import gatera_lightning
from gatera_lightning.compatibility.moved_modules import MOVED, RENAMED

HEAVY = ("torch", "transformers", "lightning", "datasets", "tensorboard", "matplotlib", "torchmetrics")


def loaded_after(statement):
    """The heavy modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}; import sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_import_loads_no_heavy_module():
    assert loaded_after("import gatera_lightning") == []


def test_adapters_load_neither_lightning_nor_datasets():
    loaded = loaded_after("from gatera_lightning import inject_adapters, save_adapter, training_loss")
    assert set(loaded) <= {"torch", "transformers"}


@pytest.mark.parametrize("name", gatera_lightning.__all__)
def test_public_name_is_importable(name):
    assert getattr(gatera_lightning, name) is not None
    assert name in dir(gatera_lightning)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(gatera_lightning.__file__).read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == {
        name: f"gatera_lightning.{module}" for name, module in gatera_lightning._MODULES.items()
    }


def test_unknown_name_is_answered_with_the_public_ones():
    with pytest.raises(AttributeError, match=r"has no attribute 'inject_adapter'.*inject_adapters"):
        gatera_lightning.inject_adapter  # noqa: B018


@pytest.mark.parametrize("old", MOVED)
def test_old_module_is_importable(old):
    sys.modules.pop(f"gatera_lightning.{old}", None)
    with pytest.warns(FutureWarning, match="has moved to gatera_lightning"):
        importlib.import_module(f"gatera_lightning.{old}")
    for new in MOVED[old]:
        importlib.import_module(f"gatera_lightning.{new}")


@pytest.mark.parametrize("old", RENAMED)
def test_old_attribute_is_found(old):
    module, _, name = old.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert getattr(importlib.import_module(f"gatera_lightning.{module}"), name) is not None


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_attribute_that_never_was_is_an_error():
    from gatera_lightning import parallel

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        parallel.nonsense  # noqa: B018
