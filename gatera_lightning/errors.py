"""What can end a run: a configuration that cannot work, a run that must not go on, a checkpoint, or the machine."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """All problems of a configuration at once; each names the setting, its value and what is accepted."""

    def __init__(self, problems: str | Sequence[str], *, on_every_process: bool = False) -> None:
        """``on_every_process``: all of a job raise it together, so that one saying it is enough."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.on_every_process = on_every_process
        super().__init__(
            "\n".join(f"  - {p}" for p in self.problems) if len(self.problems) > 1 else self.problems[0]
        )


class NonFiniteLossError(RuntimeError):
    """The loss of an optimizer step is NaN or infinite; the step was not taken."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not belong to this run."""


class Preempted(RuntimeError):
    """A signal asked the run to end; what it had reached is saved."""

    def __init__(self, checkpoint: str, step: int, *, requeued: bool) -> None:
        self.checkpoint, self.step, self.requeued = checkpoint, step, requeued
        then = (
            "the job is requeued and goes on from there"
            if requeued
            else f"resume with --ckpt_path {checkpoint}"
        )
        super().__init__(f"preempted at optimizer step {step}; saved {checkpoint}; {then}")


class AdapterFileError(ValueError):
    """An adapter folder is incomplete or corrupt, or belongs to another backbone or method."""
