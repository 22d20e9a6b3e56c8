"""Loggers that cannot be built are one problem each, before anything is loaded."""

from importlib import import_module

import pytest
from jsonargparse import Namespace

from gatera_lightning.training import logger_checks
from gatera_lightning.training.logger_checks import logger_problems

SERVER = "http://127.0.0.1:5000"


def logger(name, **settings):
    return Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(**settings))


@pytest.fixture
def installed(monkeypatch):
    """``installed(*names)``: only these of the packages that loggers need can be found."""

    def only(*names):
        monkeypatch.setattr(logger_checks, "find_spec", lambda name: object() if name in names else None)

    return only


@pytest.mark.parametrize("setting", [None, True, False, [], logger("TensorBoardLogger"), logger("CSVLogger")])
def test_loggers_without_packages_of_their_own_pass(installed, setting):
    installed()
    assert logger_problems(setting) == []


@pytest.mark.parametrize(("name", "extra"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_missing_package_is_named_with_its_extra(installed, name, extra):
    installed()
    expected = (
        f"{name} needs the package {extra}, which is not installed: pip install 'gatera-lightning[{extra}]'"
    )
    assert logger_problems(logger(name)) == [f"trainer.logger: {expected}"]
    assert logger_problems([logger("CSVLogger"), logger(name)]) == [f"trainer.logger.1: {expected}"]


def test_wandb_passes_where_it_is_installed(installed):
    installed("wandb")
    assert logger_problems(logger("WandbLogger")) == []


@pytest.fixture
def switches(monkeypatch):
    """MLflow's module of switches."""
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    return import_module("mlflow.environment_variables")


STORES = {"save_dir": "./mlruns"}, {"tracking_uri": "file:runs"}, {"tracking_uri": "runs", "save_dir": "x"}


@pytest.mark.parametrize("settings", STORES, ids=["default", "uri", "path"])
def test_folder_that_mlflow_refuses_is_told_what_it_takes(switches, monkeypatch, settings):
    if not hasattr(switches, "MLFLOW_ALLOW_FILE_STORE"):
        pytest.skip("this MLflow writes to every folder")
    (problem,) = logger_problems(logger("MLFlowLogger", **settings))
    assert problem.startswith("trainer.logger.init_args.tracking_uri: ")
    assert f"accepted: the address of a server, such as {SERVER}" in problem
    assert problem.endswith("or a folder with MLFLOW_ALLOW_FILE_STORE=true in the environment")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert logger_problems(logger("MLFlowLogger", **settings)) == []


def test_old_mlflow_writes_to_folders(switches, monkeypatch):
    monkeypatch.delattr(switches, "MLFLOW_ALLOW_FILE_STORE", raising=False)
    assert logger_problems(logger("MLFlowLogger", save_dir="./mlruns")) == []


@pytest.mark.parametrize("store", [SERVER, "https://tracking", "databricks", "databricks://profile"])
def test_servers_pass(switches, store):
    assert logger_problems(logger("MLFlowLogger", tracking_uri=store)) == []


def test_database_needs_the_whole_mlflow(installed):
    installed("mlflow")
    (problem,) = logger_problems(logger("MLFlowLogger", tracking_uri="sqlite:///mlflow.db"))
    assert problem == (
        "trainer.logger.init_args.tracking_uri: 'sqlite:///mlflow.db' is a database, which needs the whole "
        f"package mlflow: pip install mlflow; accepted without it: the address of a server, such as {SERVER}"
    )
    installed("mlflow", "sqlalchemy")
    assert logger_problems(logger("MLFlowLogger", tracking_uri="sqlite:///mlflow.db")) == []
