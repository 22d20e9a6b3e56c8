"""Record what short runs compute, bit for bit, and compare it with another commit's record.

    GATERA_DATA=… python -m benchmarks.training_trace --out before.json  # on the earlier commit
    GATERA_DATA=… python -m benchmarks.training_trace --out after.json --against before.json

Each run is twelve optimizer steps of a shipped recipe, started from the command line as a user would. The
record holds every value that was logged at each step (losses, gate statistics, gradient norms, learning
rates) and the SHA-256 of the final adapter's values. A change that must not alter numbers leaves both equal;
the command exits with 1 if they differ.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

TWO_RANKS = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
RUNS = {
    "quickstart": ["quickstart.yaml"],
    "commonsense": ["smollm2_commonsense.yaml"],
    "dialogue": ["smollm2_dialogue.yaml"],
    "math": ["smollm2_math.yaml"],
    "ddp": ["quickstart.yaml", *TWO_RANKS, "--trainer.strategy", "ddp"],
    "fsdp2": ["quickstart.yaml", "--config", "overlays/fsdp.yaml", *TWO_RANKS],
}
TIMINGS = ("throughput", "time", "memory", "seconds", "tokens_per", "flop", "mfu")
"""Parts of the names of logged values that depend on the machine, not on the mathematics."""


def record(name: str, steps: int) -> dict[str, Any]:
    """Train one run and return its logged values by step and the digest of its adapter."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *(
                "--model.backbone.dtype",
                "float32",
                "--trainer.max_steps",
                str(steps),
                "--trainer.limit_val_batches",
                "1",
            ),
            *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
            *("--trainer.logger.class_path", "lightning.pytorch.loggers.CSVLogger"),
            *("--trainer.logger.init_args.save_dir", folder, "--trainer.logger.init_args.name", "run"),
        ]
        command = [sys.executable, "-m", "gatera_lightning", "fit", "--config", *RUNS[name], *flags]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        run = Path(folder) / "run" / "version_0"
        with (run / "metrics.csv").open() as file:
            rows = [
                {key: value for key, value in row.items() if value and _is_numeric(key)}
                for row in csv.DictReader(file)
            ]
        tensors = load_file(run / "checkpoints" / "last" / "adapter_model.safetensors")
    digest = hashlib.sha256()
    # Before format 4 of adapter folders, names lacked PEFT's prefixes.
    tensors = {
        name.removeprefix("base_model.model.").replace("gatera_", ""): t for name, t in tensors.items()
    }
    for tensor_name, tensor in sorted(tensors.items()):
        digest.update(tensor_name.encode() + tensor.numpy().tobytes())
    return {"steps": rows, "adapter": digest.hexdigest()}


def _is_numeric(key: str) -> bool:
    return not any(part in key.lower() for part in TIMINGS)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The first value of each run that is not the same in both records."""
    found = []
    for name in sorted(before.keys() & after.keys()):
        if before[name]["adapter"] != after[name]["adapter"]:
            found.append(f"{name}: the final adapters differ")
        if len(before[name]["steps"]) != len(after[name]["steps"]):
            found.append(f"{name}: {len(before[name]['steps'])} and {len(after[name]['steps'])} logged rows")
        for one, other in zip(before[name]["steps"], after[name]["steps"], strict=False):
            unequal = [key for key in one.keys() & other.keys() if one[key] != other[key]]
            if unequal or one.keys() != other.keys():
                changed = {
                    key: (one.get(key), other.get(key))
                    for key in sorted(unequal or one.keys() ^ other.keys())
                }
                found.append(f"{name}: step {one.get('step')}: {changed}")
                break
    return found


def main() -> None:
    """Record the chosen runs, and compare them if another record is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--against", type=Path, help="a record of another commit")
    args = parser.parse_args()

    found = {}
    for name in args.runs:
        found[name] = record(name, args.steps)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.against is None:
        return
    before = json.loads(args.against.read_text())
    unequal = differences(before, found)
    values = sum(len(row) for run in found.values() for row in run["steps"])
    print(
        *unequal,
        f"{len(before.keys() & found.keys())} runs, {values} logged values, {len(unequal)} differences",
        sep="\n",
    )
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
