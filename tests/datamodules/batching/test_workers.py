"""Loader workers end with the process that started them."""

import subprocess
import sys


def test_exit_kills_daemons_and_waits_for_other_processes(tmp_path):
    program = f"""
import multiprocessing, pathlib, time
from gatera_lightning.datamodules.batching.workers import ignore_signals

def stubborn():
    ignore_signals(0)
    time.sleep(600)

def finishing():
    time.sleep(1)
    pathlib.Path({str(tmp_path / "finished")!r}).touch()

fork = multiprocessing.get_context("fork")
fork.Process(target=stubborn, daemon=True).start()
fork.Process(target=finishing).start()
time.sleep(0.5)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert (tmp_path / "finished").exists()
