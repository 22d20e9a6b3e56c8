"""The exceptions that end a run, each with a message for the user, and the wording that messages share."""

import difflib
import re
from collections.abc import Iterable, Sequence

# Control characters except tab and line break, surrogates, and characters that change the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Escape characters that would control a terminal, as JSON does: ESC becomes `\u001b`."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def near_miss(value: object, accepted: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` if an accepted name is close to ``value``, else an empty string."""
    close = difflib.get_close_matches(value, list(accepted), n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_value(setting: str, value: object, accepted: Iterable[str]) -> str:
    """Describe a setting whose value is not one of the accepted names, with the closest of them.

    Args:
        setting: Name of the setting.
        value: Its value; None if it is not set.
        accepted: The accepted names.
    """
    names = list(accepted)
    reason = "is not set" if value is None else f"{value!r} is unknown"
    return f"{setting}: {reason}; accepted: {', '.join(names)}{near_miss(value, names)}"


class ConfigError(ValueError):
    """A configuration that cannot work.

    Args:
        problems: Every problem that was found; each names the setting, its value and what is accepted.
        on_every_rank: Whether all ranks raise the error together, so that only one needs to print it.
    """

    def __init__(self, problems: str | Sequence[str], *, on_every_rank: bool = False) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.on_every_rank = on_every_rank
        several = len(self.problems) > 1
        super().__init__("\n".join(f"  - {p}" for p in self.problems) if several else self.problems[0])


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient of an optimizer step is NaN or infinite; the step was not taken."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is corrupt, or does not belong to this run."""


class Preempted(RuntimeError):
    """A signal ended the run after its progress was saved.

    Args:
        checkpoint: Path of the checkpoint.
        step: Optimizer steps that it holds.
        requeued: Whether the SLURM job starts again by itself.
    """

    def __init__(self, checkpoint: str, step: int, *, requeued: bool) -> None:
        self.checkpoint, self.step, self.requeued = checkpoint, step, requeued
        then = (
            "the job is requeued and resumes from there"
            if requeued
            else f"resume with --ckpt_path {checkpoint}"
        )
        super().__init__(f"preempted at optimizer step {step}; saved {checkpoint}; {then}")


class AdapterFileError(ValueError):
    """An adapter folder is incomplete or corrupt, or belongs to another backbone or method."""
