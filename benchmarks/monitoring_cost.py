"""What watching costs: CPU seconds that each callback adds to an optimizer step at its default interval.

    GATERA_DATA=… python benchmarks/monitoring.py [--config smollm2_commonsense.yaml] [any flag of fit]

A run of 13 steps in which every periodic callback is due at every fourth step. The CPU seconds of its hooks are added up by
step: ``quiet`` is the median over the steps at which it was not due, ``due`` the median over steps 4, 8 and 12. At its default
interval n it adds ``quiet + (due − quiet) / n`` to a step, which is divided by the median step without any callback. The first
step is left out: what is done there is done once a run. So are samples, which come with a validation and are told apart.
"""

import argparse
import inspect
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from gatera_lightning.cli.lightning_cli import GateRACLI
from gatera_lightning.cli.run_callbacks import RUN_CALLBACKS

STEPS, INTERVAL = 13, 4
SETTING = "every_n_steps"
IN_A_STEP = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
)


class _Timed(GateRACLI):
    """``fit``, with the CPU seconds of every callback's hooks, by step."""

    hooks: dict[str, dict[int, float]]
    ends: list[float]

    def before_fit(self) -> None:
        self.hooks, self.ends = defaultdict(lambda: defaultdict(float)), []
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            for hook in IN_A_STEP:
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
            begun = time.process_time()
            call(trainer, *args, **kwargs)
            step = (
                -1 if hook == "validation" else trainer.global_step + (hook != "on_train_batch_end")
            )  # that is being made
            self.hooks[name][step] += time.process_time() - begun

        return timed


def default_interval(callback: type) -> int:
    """Steps between two readings as the callback is shipped; 0 where nothing is periodic, or it is switched off."""
    parameter = inspect.signature(callback).parameters.get(SETTING)
    return 0 if parameter is None else int(parameter.default or 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="smollm2_commonsense.yaml")
    parser.add_argument(
        "--validate-every", metavar="N", type=int, default=40, help="steps, for samples; 40 as in the config"
    )
    own, others = parser.parse_known_args()
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
    run = _Timed(["fit", "--config", own.config, *flags, *others])

    watched = {step: sum(by_step[step] for by_step in run.hooks.values()) for step in range(2, STEPS)}
    steps = {step: run.ends[step - 1] - run.ends[step - 2] - watched[step] for step in watched}
    bare = statistics.median(steps.values())
    print(
        f"a step without callbacks: {bare:.2f} CPU s, {min(steps.values()):.2f} to {max(steps.values()):.2f}"
    )
    print("callback                quiet, ms   due, ms   default interval   share of a step")
    whole = 0.0
    for name, by_step in sorted(run.hooks.items()):
        quiet = statistics.median(by_step[step] for step in watched if step % INTERVAL)
        loud = statistics.median(by_step[step] for step in watched if step % INTERVAL == 0)
        interval = intervals.get(name, 0)
        added = quiet + ((loud - quiet) / interval if interval else 0.0)
        whole += added
        print(f"{name:<22}{1000 * quiet:>10.1f}{1000 * loud:>10.1f}{interval or '':>19}{added / bare:>17.3%}")
    print(f"all of them: {whole / bare:.2%} of a step")
    samples = run.hooks["GeneratedSamples"][-1]
    share = samples / (own.validate_every * bare)
    print(
        f"samples after a validation: {samples:.2f} CPU s, {share:.2%} of the {own.validate_every} steps between two"
    )
    print(f"all and samples: {whole / bare + share:.2%}")


if __name__ == "__main__":
    main()
