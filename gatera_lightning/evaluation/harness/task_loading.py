"""Find and load tasks of lm-eval, its own and the local ones, with errors that name the flag."""

import difflib
import fnmatch
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gatera_lightning.errors import ConfigError

LOCAL_PREFIX = "gatera_"
_LOCAL_TASKS = resources.files("gatera_lightning.evaluation.harness") / "tasks"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their rows.

    Attributes:
        by_name: Each task by its name.
        for_evaluation: The same tasks and their groups, as ``lm_eval.evaluate`` takes them.
    """

    by_name: Mapping[str, Any]
    for_evaluation: dict[str, Any]


def missing_extra() -> str:
    """Return what to install if lm-eval is missing; an empty string if it is there."""
    if importlib.util.find_spec("lm_eval") is not None:
        return ""
    return "harness: needs lm-eval, which is not installed: pip install 'gatera-lightning[harness]'"


def load_tasks(
    names: Sequence[str], settings: Mapping[str, Any], include_path: str | None = None
) -> LoadedTasks:
    """Load tasks, groups and tags by name or pattern; the rows of lm-eval's own tasks come from the hub.

    Args:
        names: Names, or patterns such as ``mmlu_*``.
        settings: What local tasks read: the model, ``template``, ``data_dir``, ``answer_format`` and
            ``max_length``.
        include_path: A folder with further tasks of the user.

    Raises:
        ConfigError: A task is unknown, its rows cannot be read, or it needs what this command does not have.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of arguments that only it passes
    own = [str(_LOCAL_TASKS), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=own, include_defaults=False, metadata=dict(settings))
    if not all(fnmatch.filter(manager.all_tasks, name) for name in names):
        # To read the index of lm-eval's 14,000 tasks takes seconds.
        manager = TaskManager(include_path=own, metadata=dict(settings))
    found: list[str] = []
    for name in names:
        matching = fnmatch.filter(manager.all_tasks, name)
        if not matching:
            raise ConfigError(_unknown(name, manager.all_tasks))
        found += [one for one in matching if one not in found]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in found:
        for kind, content in _load(manager, name).items():
            loaded[kind].update(content)
    problems = []
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(f"--tasks: {name} runs code that the model writes; accepted: other tasks")
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"--tasks: {name} needs images or sound; accepted: tasks of text")
    if problems:
        raise ConfigError(problems)
    return LoadedTasks(loaded["tasks"], loaded)


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([name])
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(
            f"--tasks: {name} needs a package that is missing: {_one_line(error)}; install it, or choose "
            "other tasks"
        ) from error
    except Exception as error:  # whatever the hub and the builders of data sets raise
        if not _is_about_the_hub(error):
            raise ConfigError(f"--tasks: {name} cannot be loaded: {_one_line(error)}") from error
        raise ConfigError(
            f"--tasks: {name} reads its rows from the hub, which cannot be reached, or does not have them "
            f"({_one_line(error)}); accepted without a hub: tasks whose rows are in its cache, or "
            f"{LOCAL_PREFIX}… with --data_dir"
        ) from error
    return found


def _is_about_the_hub(error: BaseException) -> bool:
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(modules & {"datasets", "huggingface_hub", "httpx"})


def _unknown(name: str, accepted: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"--tasks: {name!r} is unknown; accepted: names of lm-eval (`lm-eval ls tasks` lists them), patterns "
        f"such as mmlu_*, or {LOCAL_PREFIX}commonsense, {LOCAL_PREFIX}math and {LOCAL_PREFIX}dialogue with "
        f"their tasks, such as {LOCAL_PREFIX}arc_easy{hint}"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
