"""The private names of Lightning and TensorBoard exist, and only lightning_internals.py uses them."""

import ast
import importlib
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import tensorboard
import torch.utils.tensorboard
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from tiny_backbone import tiny_trainer

import gatera_lightning
from gatera_lightning.compatibility import lightning_internals
from gatera_lightning.compatibility.lightning_internals import (
    CALLED_METHODS,
    INHERITED_ATTRIBUTES,
    OVERRIDDEN_METHODS,
    attached_trainer,
    disable_hp_metric,
    read_checkpoints_by,
    release_started_processes,
    resume_only_if_asked,
    uses_distributed_sampler,
    validates_by_time,
)

PACKAGE = Path(gatera_lightning.__file__).parent
SOURCES = sorted(
    {path.resolve() for path in PACKAGE.rglob("*.py")} | set((PACKAGE / "datamodules").rglob("*.py"))
)
OTHER_LIBRARIES = {"_version", "_base", "_cdata", "_modules"}
"""Private names of tensors, storages and modules that also occur in Lightning or TensorBoard."""


def private_names(source):
    """Private attributes, methods and classes that a source text defines."""
    return set(re.findall(r"(?:self\.|def |class )(_[A-Za-z]\w*)", source))


@cache
def library_names():
    """Every private attribute, method and class in the sources of Lightning and TensorBoard."""
    names = set()
    for library in (L, tensorboard, torch.utils.tensorboard):
        for path in Path(library.__file__).parent.rglob("*.py"):
            text = path.read_text(encoding="utf-8", errors="ignore")
            names |= private_names(text)
    return names


@cache
def package_classes():
    """Every class that this package defines."""
    found = []
    for module in pkgutil.walk_packages(gatera_lightning.__path__, "gatera_lightning."):
        if not module.name.endswith("__main__"):
            members = vars(importlib.import_module(module.name)).values()
            found += [m for m in members if inspect.isclass(m) and m.__module__ == module.name]
    return found


def library_bases(cls):
    return [base for base in cls.__mro__ if base.__module__.startswith("lightning.")]


def class_at(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def listed(table, cls, name):
    """Whether a table has a private name for one of the bases of a class."""
    return any(name in names for path, names in table.items() if issubclass(cls, class_at(path)))


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


# --- the tables ---


@pytest.mark.parametrize("table", [OVERRIDDEN_METHODS, CALLED_METHODS], ids=["overridden", "called"])
def test_listed_methods_have_the_expected_parameters(table):
    for path, methods in table.items():
        for name, expected in methods.items():
            _, *found = inspect.signature(getattr(class_at(path), name)).parameters
            assert tuple(found) == expected, f"{path}.{name}"


def test_listed_attributes_exist():
    for path, names in INHERITED_ATTRIBUTES.items():
        instance = class_at(path)()
        assert all(hasattr(instance, name) for name in names), path


def test_every_overridden_private_method_is_listed():
    missing = [
        f"{cls.__name__}.{name}"
        for cls in package_classes()
        for name in vars(cls)
        if is_private(name) and any(hasattr(base, name) for base in library_bases(cls))
        if callable(getattr(cls, name)) and not listed(OVERRIDDEN_METHODS, cls, name)
    ]
    assert missing == []


def test_every_inherited_private_name_is_listed():
    missing = []
    for cls in package_classes():
        inherited = {name for base in library_bases(cls) for name in private_names(inspect.getsource(base))}
        nodes = ast.walk(ast.parse(inspect.getsource(cls)))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and is_own(node.value)}
        tables = (OVERRIDDEN_METHODS, CALLED_METHODS, INHERITED_ATTRIBUTES)
        for name in inherited & used:
            if not any(listed(table, cls, name) for table in tables):
                missing.append(f"{cls.__name__}.{name}")
    assert missing == []


def is_own(node):
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    return ast.unparse(node) in ("self", "cls", "super()")


# --- the rest of the package ---


def private_uses(path):
    """Where a source file uses private names of other objects that Lightning or TensorBoard define."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            of_torch = ast.unparse(node.value).startswith("torch.") or node.attr in OTHER_LIBRARIES
            if node.attr in library_names() and not of_torch:
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("lightning", "tensorboard")
        ):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(map(is_private, names)) or node.module.startswith("tensorboard"):
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def test_only_this_module_uses_private_names():
    own = Path(lightning_internals.__file__)
    assert [use for path in SOURCES if path != own for use in private_uses(path)] == []
    assert list(private_uses(own)) != []  # the search finds something


# --- the functions that no other test runs ---


def test_attached_trainer(tmp_path):
    module = L.LightningModule()
    assert attached_trainer(module) is None
    module.trainer = tiny_trainer(tmp_path)
    assert attached_trainer(module) is module.trainer


def test_trainer_settings(tmp_path):
    trainer = tiny_trainer(tmp_path)
    assert not uses_distributed_sampler(trainer)
    assert release_started_processes(trainer) == []
    assert uses_distributed_sampler(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))


@pytest.mark.parametrize(("interval", "by_time"), [("00:00:10:00", True), (3, False), (1.0, False)])
def test_validates_by_time(tmp_path, interval, by_time):
    assert validates_by_time(tiny_trainer(tmp_path, val_check_interval=interval)) == by_time


def test_only_ckpt_path_resumes(tmp_path, monkeypatch):
    """A checkpoint of SLURM's requeueing and one of an exception lie in the folder."""
    monkeypatch.setattr(SLURMEnvironment, "detect", staticmethod(lambda: True))
    given = tmp_path / "hpc_ckpt_1.ckpt"
    given.touch()
    (tmp_path / "on_exception.ckpt").touch()
    trainer = tiny_trainer(tmp_path, OnExceptionCheckpoint(tmp_path))
    select = {"model_provided": True, "model_connected": True}

    def selected(path):
        return trainer._checkpoint_connector._select_ckpt_path(TrainerFn.FITTING, path, **select)

    assert selected(None) == str(given)  # what Lightning does
    resume_only_if_asked(trainer)
    assert selected(None) is None
    assert selected(str(given)) == str(given)


def test_checkpoints_are_read_by_a_function_of_ours(tmp_path):
    """Also if there is none; a second function replaces the first."""
    trainer, seen = tiny_trainer(tmp_path), []
    (tmp_path / "some.ckpt").write_bytes(b"")
    version = {"pytorch-lightning_version": L.__version__}
    trainer.strategy.load_checkpoint = lambda path, **_: version | {"read": path}
    for number in (1, 2):
        read_checkpoints_by(trainer, lambda path, read, number=number: seen.append((number, path, read())))
    connector = trainer._checkpoint_connector
    connector.resume_start(None)
    connector.resume_start(tmp_path / "some.ckpt")
    assert [(number, path) for number, path, _ in seen] == [(2, None), (2, str(tmp_path / "some.ckpt"))]
    assert seen[0][2] is None
    assert seen[1][2]["read"] == tmp_path / "some.ckpt"


def test_disable_hp_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    disable_hp_metric(logger)
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert not list(Path(logger.log_dir).glob("*/hp_metric*"))
    assert b"hp_metric" not in b"".join(path.read_bytes() for path in Path(logger.log_dir).glob("events*"))
