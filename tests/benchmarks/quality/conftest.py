"""The benchmarks are not installed, so their folder has to be found."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))
