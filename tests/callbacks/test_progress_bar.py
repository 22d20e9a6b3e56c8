"""Tests of StepProgressBar: lines in a file, a bar on a terminal, nothing if it is turned off."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import datasets
import lightning as L
import pytest
import rich.console
import transformers
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.text import Text
from tiny_backbone import NO_PICTURES, run_program, tiny_args, tiny_data, tiny_module, tiny_trainer

from gatera_lightning.callbacks.progress_bar import StepProgressBar
from gatera_lightning.callbacks.throughput import Throughput
from gatera_lightning.cli.console import set_up_console
from gatera_lightning.cli.lightning_cli import GateRACLI
from gatera_lightning.cli.main import main

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f]")  # escape, carriage return and others
BAR = "[━╸╺]+"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class ExpectedFigures(L.Callback):
    """Records the figures that each step's line should show; every step takes ``pace`` simulated seconds."""

    def __init__(self, monkeypatch, stop_at=None, pace=100.0):
        self.seconds, self.stop_at, self.pace, self.expected = 0.0, stop_at, pace, {}
        monkeypatch.setattr(rich.console, "monotonic", lambda: self.seconds)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seconds += self.pace / trainer.accumulate_grad_batches
        if trainer.global_step == self.stop_at:
            raise KeyError("stopped")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.expected[trainer.global_step] = {
            "loss": f"{float(trainer.callback_metrics['train/loss']):.3f}" if trainer.global_step else None,
            "open": f"{float(trainer.callback_metrics['train/gate_mean']):.2f}"
            if trainer.global_step
            else None,
        }


def fit(folder, root, *callbacks, **settings):
    trainer = tiny_trainer(root, *callbacks, StepProgressBar(), enable_progress_bar=True, **settings)
    trainer.fit(tiny_module(folder), datamodule=tiny_data(folder))
    return trainer


def test_training_prints_lines_to_file(tiny_backbone, tmp_path, monkeypatch, capsys):
    """Lines for every second step and the last, over two epochs of six steps of two micro-batches each."""
    figures = ExpectedFigures(monkeypatch)
    settings = {"max_steps": 7, "log_every_n_steps": 2, "accumulate_grad_batches": 2, "val_check_interval": 6}
    trainer = fit(
        tiny_backbone,
        tmp_path,
        figures,
        Throughput(),
        limit_val_batches=1,
        num_sanity_val_steps=1,
        **settings,
    )
    lines = capsys.readouterr().out.splitlines()
    found = [
        re.fullmatch(r"step (\d)/7  loss ([\d.]+)  open ([\d.]+)  ([\d,]+) tokens/s(?:  ETA ([\d:]+))?", x)
        for x in lines
    ]
    steps = {int(match[1]): match for match in found if match}
    assert list(steps) == [2, 4, 6, 7]
    for step, match in steps.items():
        assert {"loss": match[2], "open": match[3]} == figures.expected[step]
    assert [match[5] for match in steps.values()] == ["8:20", "5:00", "1:40", None]
    validations = [line for line, match in zip(lines, found, strict=True) if not match]
    assert len(validations) == 2
    assert validations[0].startswith("step 3/7  val/loss ")
    assert validations[1] == f"step 6/7  val/loss {float(trainer.callback_metrics['val/loss']):.3f}"


def test_remaining_time_of_hour_long_steps(tiny_backbone, tmp_path, monkeypatch, capsys):
    fit(tiny_backbone, tmp_path, ExpectedFigures(monkeypatch, pace=3600.0))
    assert re.findall("step ([1-4]).*  ETA (.*)", capsys.readouterr().out) == [
        ("2", "2:00:00"),
        ("3", "1:00:00"),
    ]


def test_long_training_prints_line_for_each_tenth(tiny_backbone, tmp_path, capsys):
    fit(tiny_backbone, tmp_path, max_steps=35)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [
        f"{n}/35" for n in (1, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35)
    ]


def test_without_interval_only_last_step_is_printed(tiny_backbone, tmp_path, capsys):
    fit(tiny_backbone, tmp_path, log_every_n_steps=0)
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 4/4"]


def test_unknown_figures_are_omitted(tiny_backbone, tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, StepProgressBar(), enable_progress_bar=True, max_steps=1)
    trainer.fit(tiny_module(tiny_backbone, gate="none"), datamodule=tiny_data(tiny_backbone))
    assert re.fullmatch(r"step 1/1  loss [\d.]+\n", capsys.readouterr().out)


def test_resumed_run_continues_counting(tiny_backbone, tmp_path, monkeypatch, capsys):
    figures = ExpectedFigures(monkeypatch)
    first = fit(tiny_backbone, tmp_path, figures, max_steps=2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    capsys.readouterr()
    second = tiny_trainer(tmp_path, figures, StepProgressBar(), enable_progress_bar=True)
    second.fit(
        tiny_module(tiny_backbone), datamodule=tiny_data(tiny_backbone), ckpt_path=str(tmp_path / "two.ckpt")
    )
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 3/4", "step 4/4"]


def test_evaluation_prints_line_for_each_tenth(tiny_backbone, tmp_path, capsys):
    data = tiny_data(tiny_backbone, test=["everyday[:23]"], eval_batch_size=1)
    trainer = tiny_trainer(tmp_path, StepProgressBar(), enable_progress_bar=True)
    trainer.predict(tiny_module(tiny_backbone), datamodule=data, return_predictions=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("predict ")]
    assert [line.split()[1] for line in lines] == [f"{n}/23" for n in (3, 5, 7, 10, 12, 14, 17, 19, 21, 23)]


def test_training_shows_bar_on_terminal(tiny_backbone, tmp_path, monkeypatch):
    """There is one bar, and lines only for validations; stdout is restored at the end."""
    terminal, figures = Terminal(), ExpectedFigures(monkeypatch)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", terminal)
    fit(tiny_backbone, tmp_path, figures, limit_val_batches=1, val_check_interval=2)
    assert sys.stdout is terminal
    seen = Text.from_ansi(re.sub(r"\x1b\[[0-9?]*[A-Zhl]", "", terminal.getvalue()).replace("\r", "\n")).plain
    expected = figures.expected[4]
    assert re.search(
        rf"^step +{BAR} 4/4 loss {expected['loss']}  open {expected['open']}$", seen, re.MULTILINE
    )
    assert re.search(rf"^step +{BAR} 2/4 loss .* ETA 3:20$", seen, re.MULTILINE)
    assert re.search(rf"^validate {BAR} \d/1 ", seen, re.MULTILINE)
    assert len(re.findall(r"^step \d/4  val/loss [\d.]+$", seen, re.MULTILINE)) == 2
    assert not re.search(r"^step \d/4  loss", seen, re.MULTILINE)


class LogWarnings(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            logging.getLogger("gatera_lightning.adapters").warning("a warning of ours")
            logging.getLogger("lightning.pytorch.anywhere").warning("a warning of Lightning's")


def test_log_messages_are_printed_above_bar(tiny_backbone, tmp_path, monkeypatch):
    """Messages are printed through the bar, although logging is set up before the bar starts."""
    terminal, past = Terminal(), Terminal()
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", past)
    for name in ("gatera_lightning", "lightning.pytorch"):  # as if logging was not set up
        monkeypatch.setattr(logging.getLogger(name), "propagate", False)
    monkeypatch.setattr(logging.getLogger("gatera_lightning"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [logging.StreamHandler()])
    set_up_console()
    fit(tiny_backbone, tmp_path, LogWarnings())
    seen = Text.from_ansi(re.sub(r"\x1b\[[0-9?]*[A-Zhl]", "", terminal.getvalue()).replace("\r", "\n")).plain
    for warning in ("a warning of ours", "a warning of Lightning's"):
        assert warning in [line.strip() for line in seen.splitlines()]
        assert warning not in past.getvalue()


def test_log_follows_replaced_stderr(monkeypatch):
    own = logging.getLogger("gatera_lightning")
    monkeypatch.setattr(own, "propagate", False)
    monkeypatch.setattr(own, "handlers", [])
    set_up_console()
    for text in ("first", "second"):
        with io.StringIO() as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            own.warning(text)
            assert stream.getvalue() == f"{text}\n"


def test_error_restores_terminal(tiny_backbone, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(KeyError, match="stopped"):
        fit(tiny_backbone, tmp_path, ExpectedFigures(monkeypatch, stop_at=2))
    assert sys.stdout is terminal
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is visible again


def test_force_color_does_not_make_file_a_terminal(tiny_backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    fit(tiny_backbone, tmp_path, max_steps=2)
    assert not CONTROL.search(capsys.readouterr().out)


def test_other_ranks_print_nothing(monkeypatch, capsys):
    bar = StepProgressBar()
    trainer = SimpleNamespace(
        is_global_zero=False, estimated_stepping_batches=2, global_step=0, log_every_n_steps=1
    )
    bar.setup(trainer, None, "fit")
    bar.on_train_batch_start(trainer, None, {}, 0)
    trainer.global_step = 2
    bar.on_train_batch_end(trainer, None, None, {}, 0)
    assert capsys.readouterr().out == ""


# --- command line ---


def program(folder, subcommand="fit", *more):
    quiet = tiny_args(folder)
    at = quiet.index("--trainer.enable_progress_bar")
    return [subcommand, "--config", "quickstart.yaml", *quiet[:at], *quiet[at + 2 :], *NO_PICTURES, *more]


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_output_to_file_has_no_control_characters(tiny_backbone, tmp_path, monkeypatch, capfd, subcommand):
    """The bars of the libraries that load weights and convert data are off too."""
    datasets.enable_progress_bars()
    transformers.utils.logging.enable_progress_bar()
    monkeypatch.chdir(tmp_path)
    assert main(program(tiny_backbone, subcommand)) == 0
    printed = capfd.readouterr()
    assert not CONTROL.search(printed.out + printed.err)
    word, total = {"fit": ("step", 3), "validate": ("validate", 1), "test": ("test", 1)}[subcommand]
    assert re.search(rf"^{word} {total}/{total}\b", printed.out, re.MULTILINE)


def test_disabled_progress_bar_prints_nothing(tiny_backbone, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(program(tiny_backbone, "fit", "--trainer.enable_progress_bar", "false")) == 0
    printed = capfd.readouterr()
    assert "step " not in printed.out
    assert not CONTROL.search(printed.out + printed.err)
    assert "logs and checkpoints: runs/quickstart" in printed.out


def test_users_progress_bar_replaces_default(tiny_backbone, monkeypatch):
    monkeypatch.setattr(GateRACLI, "_run_subcommand", lambda *_: None)
    own = GateRACLI(program(tiny_backbone, "fit", "--trainer.callbacks", "TQDMProgressBar")).trainer
    assert type(own.progress_bar_callback) is TQDMProgressBar
    assert type(GateRACLI(program(tiny_backbone)).trainer.progress_bar_callback) is StepProgressBar


@pytest.mark.slow
def test_program_shows_bar_in_real_terminal(tiny_backbone, tmp_path):
    primary, secondary = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "90"}
    command = [sys.executable, "-m", "gatera_lightning", *program(tiny_backbone)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), secondary)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **streams) as done:
        os.close(secondary)
        seen = b""
        while True:
            try:
                part = os.read(primary, 1 << 16)
            except OSError:  # the program has ended
                break
            if not part:
                break
            seen += part
    os.close(primary)
    assert done.returncode == 0, seen[-3000:]
    plain = Text.from_ansi(re.sub(r"\x1b\[[0-9?]*[A-Zhl]", "", seen.decode()).replace("\r", "\n")).plain
    assert re.search(rf"^step +{BAR} 3/3 loss [\d.]+  open [\d.]+  [\d,]+ tokens/s", plain, re.MULTILINE)
    assert plain.index("logs and checkpoints: ") < plain.index("step ")
    assert not re.search(r"^step \d/3  loss", plain, re.MULTILINE)


@pytest.mark.slow
def test_only_rank_zero_prints(tiny_backbone, tmp_path):
    args = program(tiny_backbone, "fit", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    printed = run_program(*args, cwd=tmp_path, timeout=200)
    assert [
        line.split("  ")[0] for line in printed.splitlines() if line.startswith("step ") and "  loss " in line
    ] == [
        *("step 1/3", "step 2/3", "step 3/3"),
    ]
    assert not CONTROL.search(printed)
