"""Debian programs that some tests need: installed if that is requested, else the tests are skipped."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def needs_programs(*programs: str, packages: tuple[str, ...], options: tuple[str, ...] = ()) -> None:
    """Skip the test if a program is missing; with GATERA_TEST_INSTALL=1 install ``packages``, as root."""
    with open(Path(tempfile.gettempdir()) / f"gatera_test_install_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # apt fails while another test's apt runs
        if missing := [program for program in programs if shutil.which(program) is None]:
            if os.environ.get("GATERA_TEST_INSTALL") != "1":
                needed = " and ".join(packages)
                pytest.skip(f"{', '.join(missing)} not installed; GATERA_TEST_INSTALL=1 installs {needed}")
            subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True)
            subprocess.run(
                ["apt-get", "install", "-y", "-qq", *options, *packages],
                check=True,
                capture_output=True,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            )
