"""The watchdog by a clock of the test's own: what it warns of, and what it keeps silent about."""

import logging
import threading
from types import SimpleNamespace

import lightning as L
import pytest
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks import step_watchdog
from gatera_lightning.callbacks.step_watchdog import StepWatchdog


class Clock:
    """Time that passes when it is told to, and timers that go off by it."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def pass_by(self, seconds):
        self.now += seconds
        for timer in [timer for timer in self.timers if timer.due <= self.now]:
            self.timers.remove(timer)
            timer.function(*timer.args)

    def timer(self, interval, function, args):
        timer = SimpleNamespace(due=self.now + interval, function=function, args=args)
        timer.start = lambda: self.timers.append(timer)
        timer.cancel = lambda: self.timers.remove(timer) if timer in self.timers else None
        return timer


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_watchdog, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(
        step_watchdog, "threading", SimpleNamespace(Timer=clock.timer, get_ident=threading.get_ident)
    )
    return clock


class Pace(L.Callback):
    """Lets every step, and every validation, take what the test says."""

    def __init__(self, clock, steps, validation=0.0):
        self.clock, self.steps, self.validation = clock, steps, validation

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        seconds = self.steps[trainer.global_step]
        for part in seconds if isinstance(seconds, list) else [seconds]:
            self.clock.pass_by(part)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.clock.pass_by(self.validation)


def warnings(folder, root, clock, caplog, steps, watchdog, validation=0.0, **settings):
    """The warnings of a fit whose steps take so many seconds."""
    trainer = tiny_trainer(root, watchdog, Pace(clock, steps, validation), max_steps=len(steps), **settings)
    trainer.fit(tiny_module(folder), datamodule=tiny_data(folder))
    assert trainer.global_step == len(steps)
    return [record.getMessage() for record in caplog.records if record.name == step_watchdog.__name__]


@pytest.mark.parametrize(
    ("steps", "watchdog"),
    [
        ([50.0, 1.0, 1.2, 0.8, 9.9, 1.0], StepWatchdog(10, 0)),
        ([0.1, 0.1, 0.1, 59.0, 0.1], StepWatchdog(10, 60)),
        ([1.0, 1.0, 1000.0], StepWatchdog(0, 0)),
    ],
    ids=["below the multiple", "below the seconds", "switched off"],
)
def test_no_false_alarm(tiny_backbone, tmp_path, clock, caplog, steps, watchdog):
    assert warnings(tiny_backbone, tmp_path, clock, caplog, steps, watchdog) == []


def test_a_slow_step_is_said_once_while_it_runs(tiny_backbone, tmp_path, clock, caplog):
    steps = [1.0, 2.0, 3.0, [19.0, 2.0, 500.0], 2.0, 2.0]
    (found,) = warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0))
    assert found.startswith(
        "process 0: the micro-batch after optimizer step 3 has taken 21 s so far (usual: 2 s); now in "
    )


def test_the_seconds_are_a_floor(tiny_backbone, tmp_path, clock, caplog):
    (found,) = warnings(tiny_backbone, tmp_path, clock, caplog, [0.1, 0.1, [59.0, 2.0]], StepWatchdog(10, 60))
    assert "the micro-batch after optimizer step 2 has taken 61 s so far (usual: 0.1 s)" in found


def test_a_slow_step_does_not_become_what_is_usual(tiny_backbone, tmp_path, clock, caplog):
    found = warnings(
        tiny_backbone, tmp_path, clock, caplog, [1.0, 1.0, 100.0, 1.0, 11.0], StepWatchdog(10, 0)
    )
    assert [text.partition("has taken")[0] for text in found] == [
        "process 0: the micro-batch after optimizer step 2 ",
        "process 0: the micro-batch after optimizer step 4 ",
    ]


def test_what_is_usual_is_what_the_last_fifty_steps_took(clock):
    watchdog = StepWatchdog(10, 0)
    watchdog._times.extend([1.0] * 26 + [3.0] * 50)
    assert list(watchdog._times) == [3.0] * 50


def test_validation_does_not_count(tiny_backbone, tmp_path, clock, caplog):
    """It neither raises an alarm nor makes the next step look long; a step after it that is slow does."""
    settings = {
        "validation": 1000.0,
        "limit_val_batches": 1,
        "val_check_interval": 2,
        "num_sanity_val_steps": 1,
    }
    steps = [1.0, 1.0, 1.0, 1.0, 11.0]
    (found,) = warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0), **settings)
    assert "the micro-batch after optimizer step 4 has taken 11 s so far (usual: 1 s)" in found


class Stuck(L.Callback):
    """After the second step, a loop that only the warning ends."""

    def __init__(self):
        self.said = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.said.clear()
            while not self.said:
                pass


def test_the_line_in_which_it_stands(tiny_backbone, tmp_path):
    """By a real timer; the loop is entered right after it is set."""
    stuck = Stuck()
    handler = logging.Handler()
    handler.emit = lambda record: stuck.said.append(record.getMessage())
    step_watchdog.log.addHandler(handler)
    try:
        trainer = tiny_trainer(tmp_path, StepWatchdog(1, 0.2), stuck, max_steps=2)
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    finally:
        step_watchdog.log.removeHandler(handler)
    first = Stuck.on_train_batch_end.__code__.co_firstlineno
    places = [f"now in on_train_batch_end ({__file__}:{first + line})" for line in (3, 4)]
    assert stuck.said[0].partition("; ")[2] in places
    assert stuck.said[0].startswith("process 0: the micro-batch after optimizer step 2 has taken ")


@pytest.mark.parametrize("how", ["whole", "broken off"])
def test_after_a_run_nothing_is_watched(tiny_backbone, tmp_path, clock, caplog, how):
    steps = [1.0, 1.0, 1.0] if how == "whole" else [1.0, 1.0, ["no number"]]
    if how == "whole":
        warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0))
    else:
        with pytest.raises(TypeError):
            warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0))
    assert clock.timers == []
    clock.pass_by(10_000)
    assert "has taken" not in caplog.text


@pytest.mark.parametrize("name", ["factor", "seconds"])
def test_a_negative_setting_is_refused(name):
    with pytest.raises(ValueError, match=rf"watchdog\.{name}: -1; accepted: a number of at least 0"):
        StepWatchdog(**{name: -1})
