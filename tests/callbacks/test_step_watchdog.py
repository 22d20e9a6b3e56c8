"""Tests of StepWatchdog with a simulated clock."""

import logging
import threading
from types import SimpleNamespace

import lightning as L
import pytest
from tiny_backbone import tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks import step_watchdog
from gatera_lightning.callbacks.step_watchdog import StepWatchdog


class Clock:
    """Simulated time, and timers that fire by it."""

    def __init__(self):
        self.now, self.timers = 0.0, []

    def advance(self, seconds):
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
    """Lets every step and every validation take the given number of seconds."""

    def __init__(self, clock, steps, validation=0.0):
        self.clock, self.steps, self.validation = clock, steps, validation

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        seconds = self.steps[trainer.global_step]
        for part in seconds if isinstance(seconds, list) else [seconds]:
            self.clock.advance(part)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.clock.advance(self.validation)


def warnings(folder, root, clock, caplog, steps, watchdog, validation=0.0, **settings):
    """Train with steps of the given durations; returns the warnings."""
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
    ids=["below the factor", "below the seconds", "turned off"],
)
def test_no_warning_for_usual_steps(tiny_backbone, tmp_path, clock, caplog, steps, watchdog):
    assert warnings(tiny_backbone, tmp_path, clock, caplog, steps, watchdog) == []


def test_slow_step_causes_one_warning_while_running(tiny_backbone, tmp_path, clock, caplog):
    steps = [1.0, 2.0, 3.0, [19.0, 2.0, 500.0], 2.0, 2.0]
    (found,) = warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0))
    assert found.startswith(
        "rank 0: the micro-batch after optimizer step 3 has taken 21 s so far (usual: 2 s); now in "
    )


def test_no_warning_before_minimum_seconds(tiny_backbone, tmp_path, clock, caplog):
    (found,) = warnings(tiny_backbone, tmp_path, clock, caplog, [0.1, 0.1, [59.0, 2.0]], StepWatchdog(10, 60))
    assert "the micro-batch after optimizer step 2 has taken 61 s so far (usual: 0.1 s)" in found


def test_slow_step_does_not_change_usual_time(tiny_backbone, tmp_path, clock, caplog):
    found = warnings(
        tiny_backbone, tmp_path, clock, caplog, [1.0, 1.0, 100.0, 1.0, 11.0], StepWatchdog(10, 0)
    )
    assert [text.partition("has taken")[0] for text in found] == [
        "rank 0: the micro-batch after optimizer step 2 ",
        "rank 0: the micro-batch after optimizer step 4 ",
    ]


def test_usual_time_covers_last_fifty_steps(clock):
    watchdog = StepWatchdog(10, 0)
    watchdog._times.extend([1.0] * 26 + [3.0] * 50)
    assert list(watchdog._times) == [3.0] * 50


def test_validation_does_not_count_as_step(tiny_backbone, tmp_path, clock, caplog):
    """A validation causes no warning and does not prolong the next step; a slow step after it does."""
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
    """Runs a loop after the second step until the warning arrives."""

    def __init__(self):
        self.messages = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            self.messages.clear()
            while not self.messages:
                pass


def test_warning_names_running_line(tiny_backbone, tmp_path):
    """With a real timer; the loop starts right after the timer."""
    stuck = Stuck()
    handler = logging.Handler()
    handler.emit = lambda record: stuck.messages.append(record.getMessage())
    step_watchdog.log.addHandler(handler)
    try:
        trainer = tiny_trainer(tmp_path, StepWatchdog(1, 0.2), stuck, max_steps=2)
        trainer.fit(tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone))
    finally:
        step_watchdog.log.removeHandler(handler)
    first = Stuck.on_train_batch_end.__code__.co_firstlineno
    places = [f"now in on_train_batch_end ({__file__}:{first + line})" for line in (3, 4)]
    assert stuck.messages[0].partition("; ")[2] in places
    assert stuck.messages[0].startswith("rank 0: the micro-batch after optimizer step 2 has taken ")


@pytest.mark.parametrize("end", ["completed", "failed"])
def test_no_timer_after_run(tiny_backbone, tmp_path, clock, caplog, end):
    steps = [1.0, 1.0, 1.0] if end == "completed" else [1.0, 1.0, ["no number"]]
    if end == "completed":
        warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0))
    else:
        with pytest.raises(TypeError):
            warnings(tiny_backbone, tmp_path, clock, caplog, steps, StepWatchdog(10, 0))
    assert clock.timers == []
    clock.advance(10_000)
    assert "has taken" not in caplog.text


@pytest.mark.parametrize("name", ["factor", "seconds"])
def test_negative_arguments_are_rejected(name):
    with pytest.raises(ValueError, match=rf"watchdog\.{name}: -1; accepted: a number of at least 0"):
        StepWatchdog(**{name: -1})
