"""Train/test overlap: questions that occur in more than one split."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset

from gatera_lightning.datamodules.example import Example
from gatera_lightning.errors import ConfigError


@dataclass(frozen=True)
class SplitOverlap:
    """The questions of a split that also occur in another split; ``str()`` gives a one-line report."""

    split: str

    size: int
    """Number of examples of the split."""

    indices: tuple[int, ...] = ()
    """Indices of the examples that also occur in the other split."""

    tasks: dict[str, int] = field(default_factory=dict)
    """Number of these examples in each task."""

    other: str = "train"
    """The split that was compared with."""

    unread: str = ""
    """Why the split could not be compared; empty if it was."""

    def __str__(self) -> str:
        subject = f"{self.other}/{self.split} overlap"
        if self.unread:
            return f"{subject}: not checked, because the {self.split} examples cannot be read ({self.unread})"
        if not self.indices:
            return f"{subject}: none of {self.size:,} {self.split} examples"
        by_task = ", ".join(f"{task} {count:,}" for task, count in sorted(self.tasks.items()))
        first = ", ".join(map(str, self.indices[:5])) + (", …" if len(self.indices) > 5 else "")
        consequence = (
            f"{self.split} results on them measure memorization"
            if self.other == "train"
            else "a checkpoint may have been selected on them"
        )
        return (
            f"{subject}: {len(self.indices):,} of {self.size:,} {self.split} examples are also in "
            f"{self.other} ({by_task}; indices {first}). They are not removed; {consequence}."
        )


def find_overlap(
    other_keys: Collection[str], keys: Sequence[str], tasks: Sequence[str], split: str, other: str = "train"
) -> SplitOverlap:
    """Find the questions of a split that also occur in another split.

    Args:
        other_keys: ``Example.key`` of each example of the other split.
        keys: ``Example.key`` of each example of the split.
        tasks: Task of each example of the split.
        split: Name of the split.
        other: Name of the other split.
    """
    seen = frozenset(other_keys)
    indices = tuple(index for index, key in enumerate(keys) if key in seen)
    return SplitOverlap(split, len(keys), indices, dict(Counter(tasks[index] for index in indices)), other)


def find_split_overlaps(
    tables: Mapping[str, Dataset], test_examples: Callable[[], Iterable[Example]]
) -> list[SplitOverlap]:
    """Compare validation and test examples with the training split, and test with validation examples.

    Args:
        tables: Token tables of the training split and, if there is one, of the validation split.
        test_examples: Reads the test examples. Training does not need them, so a ConfigError is reported.

    Returns:
        One result for each split; test with validation only if there is an overlap.
    """
    train_keys = set(tables["train"]["key"])
    found: list[SplitOverlap] = []
    validation_keys: set[str] = set()
    if "validation" in tables:
        validation = tables["validation"]
        found.append(find_overlap(train_keys, validation["key"], validation["task"], "validation"))
        validation_keys = set(validation["key"])
    try:
        tested = [(example.key, example.task) for example in test_examples()]
    except ConfigError as error:
        return [*found, SplitOverlap("test", 0, unread=str(error))]
    if tested:
        keys, tasks = zip(*tested, strict=True)
        found.append(find_overlap(train_keys, keys, tasks, "test"))
        with_validation = find_overlap(validation_keys, keys, tasks, "test", other="validation")
        found += [with_validation] if with_validation.indices else []
    return found
