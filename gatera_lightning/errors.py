"""The exceptions that end a run, each with a message for the user."""

from collections.abc import Sequence


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
