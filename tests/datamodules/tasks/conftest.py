"""The published data sets, for tests on real rows."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def published_data():
    """The folder ``$GATERA_DATA``, which contains commonsense/, dialogue/ and math/."""
    if "GATERA_DATA" not in os.environ:
        pytest.skip("GATERA_DATA is not set: the folder of the published data sets")
    return Path(os.environ["GATERA_DATA"])
