"""What monitoring costs: CPU seconds that each callback adds to an optimizer step at its default interval.

    GATERA_DATA=… python -m benchmarks.monitoring_cost [--config smollm2_commonsense.yaml] [any flag of fit]

A run of 13 steps in which every periodic callback is due at every fourth step. The CPU seconds of each
callback's hooks are added up by step: ``quiet`` is the median over the steps at which it was not due,
``due`` the median over steps 4, 8 and 12. At its default interval n, a callback adds ``quiet + (due −
quiet) / n`` to a step; this is divided by the median step without any callback. The first step is left out,
because its costs occur once per run. So are generated samples, which follow a validation and have a line of
their own.
"""

import inspect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from benchmarks.harness.arguments import build_parser
from gatera_lightning.cli.lightning_cli import GateRACLI
from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS

STEPS, INTERVAL = 13, 4
SETTING = "every_n_steps"
STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)


class _TimedCLI(GateRACLI):
    """``fit``, with the CPU seconds of every callback's hooks."""

    hooks: dict[str, dict[int, float]]
    """CPU seconds by callback and step; −1 is the validation."""

    ends: list[float]
    """CPU seconds of the process at the end of each step."""

    def before_fit(self) -> None:
        self.hooks, self.ends = defaultdict(lambda: defaultdict(float)), []
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            for hook in STEP_HOOKS:
                setattr(callback, hook, self._timed(type(callback).__name__, hook, getattr(callback, hook)))
            callback.on_validation_end = self._timed(
                type(callback).__name__, "validation", callback.on_validation_end
            )
        last = callbacks[-1].on_train_batch_end

        def end(*args: Any, **kwargs: Any) -> None:
            last(*args, **kwargs)
            self.ends.append(time.process_time())

        callbacks[-1].on_train_batch_end = end

    def _timed(self, name: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(trainer: Any, *args: Any, **kwargs: Any) -> None:
            started = time.process_time()
            call(trainer, *args, **kwargs)
            # The step that is being taken, which the Trainer counts before the last hook.
            current = trainer.global_step + (hook != "on_train_batch_end")
            self.hooks[name][-1 if hook == "validation" else current] += time.process_time() - started

        return timed


def default_interval(callback: type) -> int:
    """Return the default of ``every_n_steps``; 0 if the callback is not periodic, or off by default."""
    parameter = inspect.signature(callback).parameters.get(SETTING)
    return 0 if parameter is None else int(parameter.default or 0)


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--config", default="smollm2_commonsense.yaml")
    parser.add_argument(
        "--validate-every",
        metavar="N",
        type=int,
        default=40,
        help="steps between two validations, for samples (default: 40)",
    )
    args, flags_of_fit = parser.parse_known_args()
    intervals = {callback.__name__: default_interval(callback) for callback in RUN_CALLBACKS.values()}
    due = [
        f"--{section}.{SETTING}={INTERVAL}"
        for section, kind in RUN_CALLBACKS.items()
        if intervals[kind.__name__]
    ]
    flags = [
        f"--trainer.max_steps={STEPS}",
        f"--trainer.val_check_interval={STEPS}",
        "--trainer.limit_val_batches=1",
        *due,
    ]
    run = _TimedCLI(["fit", "--config", args.config, *flags, *flags_of_fit])

    in_callbacks = {step: sum(by_step[step] for by_step in run.hooks.values()) for step in range(2, STEPS)}
    steps = {step: run.ends[step - 1] - run.ends[step - 2] - in_callbacks[step] for step in in_callbacks}
    median = statistics.median(steps.values())
    low, high = min(steps.values()), max(steps.values())
    print(f"a step without callbacks: {median:.2f} CPU s, {low:.2f} to {high:.2f}")
    print("callback                quiet, ms   due, ms   default interval   share of a step")
    total = 0.0
    for name, by_step in sorted(run.hooks.items()):
        quiet = statistics.median(by_step[step] for step in in_callbacks if step % INTERVAL)
        due_seconds = statistics.median(by_step[step] for step in in_callbacks if step % INTERVAL == 0)
        interval = intervals.get(name, 0)
        added = quiet + ((due_seconds - quiet) / interval if interval else 0.0)
        total += added
        print(
            f"{name:<22}{1000 * quiet:>10.1f}{1000 * due_seconds:>10.1f}"
            f"{interval or '':>19}{added / median:>17.3%}"
        )
    print(f"all callbacks: {total / median:.2%} of a step")
    samples = run.hooks["GeneratedSamples"][-1]
    share = samples / (args.validate_every * median)
    print(f"samples after a validation: {samples:.2f} CPU s, {share:.2%} of {args.validate_every} steps")
    print(f"all callbacks and samples: {total / median + share:.2%}")


if __name__ == "__main__":
    main()
