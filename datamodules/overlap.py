"""Train/test overlap: questions that occur in more than one split."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset

from gatera_lightning.datamodules.example import Example
from gatera_lightning.errors import ConfigError, printable


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

    reanswered: tuple[int, ...] = ()
    """Indices of the examples whose request occurs in the other split, but with other responses alone."""

    def __str__(self) -> str:
        subject = f"{self.other}/{self.split} overlap"
        if self.unread:
            return f"{subject}: not checked, because the {self.split} examples cannot be read ({self.unread})"
        found = f"none of {self.size:,} {self.split} examples"
        if self.indices:
            by_task = ", ".join(f"{printable(task)} {count:,}" for task, count in sorted(self.tasks.items()))
            found = (
                f"{len(self.indices):,} of {self.size:,} {self.split} examples are also in {self.other} "
                f"({by_task}; {_first(self.indices)})"
            )
        if self.reanswered:
            found += (
                f"; {len(self.reanswered):,} have a request of {self.other} with another response "
                f"({_first(self.reanswered)})"
            )
        if not (self.indices or self.reanswered):
            return f"{subject}: {found}"
        consequence = (
            f"{self.split} results on them measure memorization"
            if self.other == "train"
            else "a checkpoint may have been selected on them"
        )
        return f"{subject}: {found}. They are not removed; {consequence}."


def _first(indices: Sequence[int]) -> str:
    return "indices " + ", ".join(map(str, indices[:5])) + (", …" if len(indices) > 5 else "")


def find_overlap(
    other_keys: Collection[str],
    keys: Sequence[str],
    tasks: Sequence[str],
    split: str,
    other: str = "train",
    *,
    other_requests: Collection[str] = (),
    requests: Sequence[str] = (),
) -> SplitOverlap:
    """Find the questions of a split that also occur in another split, and those that it answers otherwise.

    Args:
        other_keys: ``Example.key`` of each example of the other split.
        keys: ``Example.key`` of each example of the split.
        tasks: Task of each example of the split.
        split: Name of the split.
        other: Name of the other split.
        other_requests: ``Example.request_key`` of each example of the other split.
        requests: ``Example.request_key`` of each example of the split.
    """
    seen, requested = frozenset(other_keys), frozenset(other_requests)
    indices = tuple(index for index, key in enumerate(keys) if key in seen)
    reanswered = tuple(
        index for index, request in enumerate(requests) if request in requested and keys[index] not in seen
    )
    by_task = dict(Counter(tasks[index] for index in indices))
    return SplitOverlap(split, len(keys), indices, by_task, other, reanswered=reanswered)


@dataclass(frozen=True)
class _Keys:
    """What identifies the examples of a split, (examples,) each."""

    keys: Sequence[str] = ()
    requests: Sequence[str] = ()
    tasks: Sequence[str] = ()

    @classmethod
    def of_table(cls, table: Dataset) -> "_Keys":
        return cls(table["key"][:], table["request_key"][:], table["task"][:])

    def overlap(self, other: "_Keys", split: str, other_split: str = "train") -> SplitOverlap:
        return find_overlap(
            other.keys,
            self.keys,
            self.tasks,
            split,
            other_split,
            other_requests=other.requests,
            requests=self.requests,
        )


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
    train = _Keys.of_table(tables["train"])
    found: list[SplitOverlap] = []
    validation = _Keys()
    if "validation" in tables:
        validation = _Keys.of_table(tables["validation"])
        found.append(validation.overlap(train, "validation"))
    try:
        tested = [(example.key, example.request_key, example.task) for example in test_examples()]
    except ConfigError as error:
        return [*found, SplitOverlap("test", 0, unread=str(error))]
    if tested:
        test = _Keys(*zip(*tested, strict=True))
        found.append(test.overlap(train, "test"))
        with_validation = test.overlap(validation, "test", "validation")
        found += [with_validation] if with_validation.indices or with_validation.reanswered else []
    return found
