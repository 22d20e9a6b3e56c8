"""What a shipped recipe reaches by method and seed: ``fit``, ``test`` and ``compare``, as a user runs them.

    GATERA_DATA=… python -m benchmarks.recipe smollm2_dialogue.yaml --seeds 0 1 2 --out results/dialogue
    GATERA_DATA=… python -m benchmarks.recipe smollm2_commonsense.yaml \\
        --methods untrained lora hira gatera --out results/c

Arguments after ``--`` are passed to both subcommands: ``-- --data.init_args.answer_format label``. Methods
share data, the order of examples, steps and schedule; the learning rate is that of the recipe or the
overlay. A seed draws the adapter, the examples of a step and their order, and the validation split; the
test examples are the same for all seeds. Results in ``--out`` are not computed again, and an interrupted
evaluation resumes. Seconds are those of the whole process, start and loading included.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.arguments import build_parser

METHODS = {"untrained": [], "lora": ["--config", "lora.yaml"], "dora": ["--config", "dora.yaml"]}
METHODS |= {"hira": ["--config", "hira.yaml"], "gatera": []}


def run_subcommand(*args: str) -> dict[str, float]:
    """Run a subcommand in a process of its own, and return its wall-clock and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "gatera_lightning", *args], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.perf_counter() - started, 1), "cpu": round(cpu, 1)}


def fit_and_test(recipe: str, method: str, seed: int, out: Path, extra: list[str]) -> Path:
    """Train and test once, and return the folder of the evaluation."""
    name = method if method == "untrained" else f"{method}-{seed}"
    settings = [
        "--config",
        recipe,
        *METHODS[method],
        "--seed_everything",
        str(seed),
        "--data.init_args.seed",
        str(seed),
        *extra,
    ]
    adapter, folder, times = out / f"{name}-adapter", out / name, out / f"{name}-seconds.json"
    seconds: dict[str, Any] = json.loads(times.read_text()) if times.is_file() else {}
    if method != "untrained" and not adapter.is_symlink():
        where = ["--trainer.logger.init_args.save_dir", str(out / f"{name}-run")]
        seconds["fit"] = run_subcommand("fit", *settings, *where)
        newest = max(
            (out / f"{name}-run").glob("*/version_*/checkpoints/last"), key=lambda path: path.stat().st_mtime
        )
        adapter.symlink_to(newest.resolve())
    if not (folder / "test_results.json").is_file():
        where = [
            "--trainer.logger.init_args.save_dir",
            str(out / f"{name}-test"),
            "--evaluation.folder",
            str(folder),
        ]
        warm = ["--model.warm_start", str(adapter)] if method != "untrained" else []
        seconds["test"] = run_subcommand("test", *settings, *where, *warm)
    times.write_text(json.dumps(seconds) + "\n")
    return folder


def summary(folder: Path) -> str:
    """Return the figures of one evaluation, on one line."""
    found = json.loads((folder / "test_results.json").read_text())
    seconds = json.loads(folder.with_name(f"{folder.name}-seconds.json").read_text())
    figures = {"nats": found["nats_per_target_token"], "perplexity": found["perplexity"]}
    figures |= {measure: average["accuracy"] for measure, average in found["average"].items()} | found["text"]
    parts = [f"{name} {value:.4g}" for name, value in figures.items() if value is not None]
    parts += [
        f"{subcommand} {used['wall']:.0f} s ({used['cpu']:.0f} CPU s)" for subcommand, used in seconds.items()
    ]
    return f"{folder.name}: {', '.join(parts)}"


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("recipe", help="a shipped config whose data has init_args.seed")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["untrained", "gatera"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    extra = sys.argv[len(own) + 2 :]
    args = parser.parse_args(own)

    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for method in args.methods:
        for seed in args.seeds[:1] if method == "untrained" else args.seeds:
            runs.append(fit_and_test(args.recipe, method, seed, args.out, extra))
            print(summary(runs[-1]), flush=True)
    if len(runs) > 1:
        report = [
            arg for name in ("comparison.md", "comparison.json") for arg in ("--out", str(args.out / name))
        ]
        run_subcommand("compare", *map(str, runs), *report)
    print(*map(summary, runs), sep="\n")


if __name__ == "__main__":
    main()
