"""Collect Python objects from all ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def gather_objects(value: T) -> list[T]:
    """Collect one object from every rank. Collective: every rank calls it.

    Args:
        value: This rank's object; it is pickled.

    Returns:
        The objects in the order of the ranks; ``[value]`` where no process group is initialized.
    """
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def run_on_every_rank(work: Callable[[], None], *, catch: tuple[type[BaseException], ...]) -> str | None:
    """Do this rank's share of some work, then learn whether every rank succeeded. Collective.

    A disk may be full for one rank only. If that rank alone raised, the others would wait for it.

    Args:
        work: This rank's share.
        catch: The exceptions that count as a failure.

    Returns:
        The message of the first rank that failed, on all ranks; None if no rank failed.
    """
    failure = None
    try:
        work()
    except catch as error:
        failure = " ".join(str(error).split())
    return next(filter(None, gather_objects(failure)), None)
