"""Loggers that cannot be built here: a package is missing, or MLflow refuses the store."""

import re
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

_EXTRAS = {WandbLogger: "wandb", MLFlowLogger: "mlflow"}
"""Logger -> the package that it needs, which is also the name of the extra."""

_ALLOWS_FILES = "MLFLOW_ALLOW_FILE_STORE"
_NAMED_STORES = ("databricks", "databricks-uc", "uc")


def logger_problems(setting: Any) -> list[str]:
    """Return one message for every logger that cannot be built here.

    Args:
        setting: ``trainer.logger`` of a parsed config: null, a switch, a class with its settings, or a list.
    """
    if isinstance(setting, list):
        sections = {f"trainer.logger.{index}": entry for index, entry in enumerate(setting)}
    else:
        sections = {"trainer.logger": setting}
    found = (_problem(section, entry) for section, entry in sections.items() if hasattr(entry, "class_path"))
    return [problem for problem in found if problem]


def _problem(section: str, entry: Any) -> str:
    module, _, name = entry.class_path.rpartition(".")
    logger = getattr(import_module(module), name)  # the parser has imported it
    package = next((package for kind, package in _EXTRAS.items() if issubclass(logger, kind)), None)
    if package is None:
        return ""
    if find_spec(package) is None:
        return (
            f"{section}: {name} needs the package {package}, which is not installed: "
            f"pip install 'gatera-lightning[{package}]'"
        )
    return _store_problem(section, entry) if package == "mlflow" else ""


def _store_problem(section: str, entry: Any) -> str:
    """Why MLflow refuses the place that a logger writes to; empty if it does not."""
    settings = entry.get("init_args") or {}
    store = settings.get("tracking_uri") or f"file:{settings.get('save_dir')}"
    scheme = re.split(r"[:+]", store)[0] if ":" in store or store in _NAMED_STORES else "file"
    server = "the address of a server, such as http://127.0.0.1:5000"
    if scheme == "file" and not _files_allowed():
        return (
            f"{section}.init_args.tracking_uri: {store!r} is a folder, which MLflow no longer writes to by "
            f"default; accepted: {server}, or a folder with {_ALLOWS_FILES}=true in the environment"
        )
    if scheme in ("sqlite", "postgresql", "mysql", "mssql") and find_spec("sqlalchemy") is None:
        return (
            f"{section}.init_args.tracking_uri: {store!r} is a database, which needs the whole package "
            f"mlflow: pip install mlflow; accepted without it: {server}"
        )
    return ""


def _files_allowed() -> bool:
    """Whether the installed MLflow writes to folders; old versions know no such switch and always do."""
    import mlflow.environment_variables as switches

    switch = getattr(switches, _ALLOWS_FILES, None)
    return switch is None or bool(switch.get())
