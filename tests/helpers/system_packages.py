"""Programs that some tests need and Python's index does not have: Debian's, installed where that is asked for, else skipped."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def needs_programs(*programs: str, packages: tuple[str, ...], options: tuple[str, ...] = ()) -> None:
    """Skip with the reason where a program is missing; GATERA_TEST_INSTALL=1 installs ``packages`` instead, as root."""
    with open(Path(tempfile.gettempdir()) / f"gatera_test_install_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # apt gives up where another test's apt is at work
        if missing := [program for program in programs if shutil.which(program) is None]:
            if os.environ.get("GATERA_TEST_INSTALL") != "1":
                pytest.skip(
                    f"{', '.join(missing)} not installed; GATERA_TEST_INSTALL=1 installs {' and '.join(packages)}"
                )
            subprocess.run(["apt-get", "update", "-qq"], check=True, capture_output=True)
            subprocess.run(
                ["apt-get", "install", "-y", "-qq", *options, *packages],
                check=True,
                capture_output=True,
                env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            )
