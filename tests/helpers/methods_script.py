"""Runs of ``fit_script.py`` with every update and gate, one after the other in the same processes.

``python methods_script.py JOB``: each run writes to ``OUT/UPDATE-GATE``.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from adapted_layers import TRAINED_METHODS
from fit_script import Job, run


def main(job):
    for update, gate in TRAINED_METHODS:
        out = Path(job.out) / f"{update}-{gate}"
        out.mkdir(exist_ok=True)
        run(replace(job, update=update, gate=gate, out=str(out)))


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
