"""The two errors of this package: a configuration that cannot work, and a run that must not go on."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """All problems of a configuration at once; each names the setting, its value and what is accepted."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(f"  - {p}" for p in self.problems) if len(self.problems) > 1 else self.problems[0])


class NonFiniteLossError(RuntimeError):
    """The loss of an optimizer step is NaN or infinite; the step was not taken."""
