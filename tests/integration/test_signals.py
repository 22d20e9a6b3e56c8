"""SIGINT and SIGTERM end every subcommand at any moment: with the signal's exit code and one line.

``GATERA_SIGNALS`` is the number of programs that are interrupted at random: four by default, thirty under
``make stress``.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from evaluations import perturbed_module
from tiny_backbone import run_program, tiny_args

from gatera_lightning import save_adapter

COUNT = int(os.environ.get("GATERA_SIGNALS", "4"))
SAVED_AND_ENDED = 75
"""What ``fit`` exits with once it has saved its progress."""

COMMANDS = {
    "fit": ["fit", "RECIPE", "--trainer.max_steps", "200"],
    "validate": ["validate", "RECIPE"],
    "test": ["test", "RECIPE", "--data.init_args.evaluate_by", "[likelihood, generation]"],
    "predict": ["predict", "RECIPE"],
    "chat": ["chat", "--adapter", "adapter"],
    "generate": ["generate", "--adapter", "adapter", "--prompt", "Why?", "--max_new_tokens", "200"],
    "preview": ["preview", "RECIPE"],
    "estimate": ["estimate", "RECIPE"],
    "gates": ["gates", "--adapter", "adapter", "--out", "gates.html"],
    "harness": ["harness", "--adapter", "adapter", "--tasks", "gatera_everyday", "--out", "harness"],
    "serve": ["serve", "adapter", "--port", "0"],
    "export": ["export", "run/version_0/checkpoints", "--out", "exported"],
    "demo": ["demo", "RECIPE"],
}


@pytest.fixture(scope="module")
def folder(tiny_backbone, tmp_path_factory):
    """A folder with an adapter and with the checkpoints of a run."""
    folder = tmp_path_factory.mktemp("signals")
    save_adapter(perturbed_module(tiny_backbone).model, folder / "adapter")
    run_program(*expand(COMMANDS["fit"], tiny_backbone), "--trainer.max_steps", "1", cwd=folder)
    return folder


def expand(command, backbone):
    recipe = ["--config", "quickstart.yaml", *tiny_args(backbone)]
    recipe += ["--trainer.logger.init_args.save_dir", ".", "--trainer.logger.init_args.name", "run"]
    return [part for arg in command for part in (recipe if arg == "RECIPE" else [arg])]


def interrupt(command, folder, number, delay):
    """Start a command, and send it a signal after ``delay`` seconds.

    Returns:
        Its exit code, its standard error and the seconds from the signal to its end; None if it had ended.
    """
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    program = subprocess.Popen(
        [sys.executable, "-m", "gatera_lightning", *command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background job ignores it
        **options,
    )
    try:
        program.wait(timeout=delay)
        return None
    except subprocess.TimeoutExpired:
        program.send_signal(number)
        start = time.monotonic()
        _, errors = program.communicate(timeout=60)
        if program.returncode == -number:
            return None  # all was done, and Python was shutting down
        return program.returncode, errors, time.monotonic() - start
    finally:
        program.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(COUNT))
def test_signal_ends_command_with_one_line(tiny_backbone, folder, number):
    draw = random.Random(number)
    name = list(COMMANDS)[number % len(COMMANDS)]
    turn = number if len(COMMANDS) > COUNT else number // len(COMMANDS)
    sent = (signal.SIGINT, signal.SIGTERM)[turn % 2]
    delay, ended = draw.uniform(0.3, 8), None
    while ended is None:
        ended = interrupt(expand(COMMANDS[name], tiny_backbone), folder, sent, delay)
        delay *= 0.7  # the command had ended before the signal
    code, errors, seconds = ended
    print(f"{name} {sent.name} after {delay / 0.7:.1f} s: exit {code}, {seconds:.1f} s later")
    assert "Traceback" not in errors
    assert code == 128 + sent or (name == "fit" and code == SAVED_AND_ENDED), errors[-2000:]
    last = errors.strip().splitlines()[-1]
    assert last.startswith("python -m gatera_lightning: "), errors[-2000:]
    assert sent.name in last or code == SAVED_AND_ENDED, errors[-2000:]
