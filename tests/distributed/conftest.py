"""Ranks that a test starts itself."""

import pytest
from launched_ranks import Launcher


@pytest.fixture
def launch(tiny_backbone, tmp_path):
    return Launcher(tiny_backbone, tmp_path)
