"""What a shipped recipe reaches by method and seed: ``fit``, ``test`` and ``compare``, each as a user types it.

    GATERA_DATA=… python benchmarks/recipe.py smollm2_dialogue.yaml --seeds 0 1 2 --out results/dialogue
    GATERA_DATA=… python benchmarks/recipe.py smollm2_commonsense.yaml --methods untrained lora hira gatera --out results/c

What follows ``--`` goes to both verbs: ``-- --data.init_args.answer_format label``. Methods share data, order of rows, steps
and schedule; the learning rate is the recipe's or the overlay's. A seed draws the adapter, the rows of a step and their
order; held-out rows are drawn by the seed too, test rows are the same. What ``--out`` holds already is not computed again,
and an interrupted evaluation goes on where it stopped. Seconds are of the whole process, start and loading included.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

METHODS = {"untrained": [], "lora": ["--config", "lora.yaml"], "dora": ["--config", "dora.yaml"]}
METHODS |= {"hira": ["--config", "hira.yaml"], "gatera": []}


def program(*args: str) -> dict[str, float]:
    """Run one verb in a process of its own, with a fresh memory and random state; its wall and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "gatera_lightning", *args], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.perf_counter() - started, 1), "cpu": round(cpu, 1)}


def run(recipe: str, method: str, seed: int, out: Path, rest: list[str]) -> Path:
    """Fit and test once; the folder of the evaluation."""
    name = method if method == "untrained" else f"{method}-{seed}"
    settings = [
        "--config",
        recipe,
        *METHODS[method],
        "--seed_everything",
        str(seed),
        "--data.init_args.seed",
        str(seed),
        *rest,
    ]
    adapter, folder, times = out / f"{name}-adapter", out / name, out / f"{name}-seconds.json"
    seconds: dict[str, Any] = json.loads(times.read_text()) if times.is_file() else {}
    if method != "untrained" and not adapter.is_symlink():
        where = ["--trainer.logger.init_args.save_dir", str(out / f"{name}-run")]
        seconds["fit"] = program("fit", *settings, *where)
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
        seconds["test"] = program("test", *settings, *where, *warm)
    times.write_text(json.dumps(seconds) + "\n")
    return folder


def line(folder: Path) -> str:
    """The figures of one evaluation."""
    found = json.loads((folder / "test_results.json").read_text())
    seconds = json.loads(folder.with_name(f"{folder.name}-seconds.json").read_text())
    figures = {"nats": found["nats_per_target_token"], "perplexity": found["perplexity"]}
    figures |= {measure: average["accuracy"] for measure, average in found["average"].items()} | found["text"]
    told = [f"{name} {value:.4g}" for name, value in figures.items() if value is not None]
    told += [f"{verb} {used['wall']:.0f} s ({used['cpu']:.0f} CPU s)" for verb, used in seconds.items()]
    return f"{folder.name}: {', '.join(told)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a shipped config with an init_args.seed in its data")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["untrained", "gatera"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    rest = sys.argv[len(own) + 2 :]
    args = parser.parse_args(own)

    args.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for method in args.methods:
        for seed in args.seeds[:1] if method == "untrained" else args.seeds:
            runs.append(run(args.recipe, method, seed, args.out, rest))
            print(line(runs[-1]), flush=True)
    if len(runs) > 1:
        report = [
            arg for name in ("comparison.md", "comparison.json") for arg in ("--out", str(args.out / name))
        ]
        program("compare", *map(str, runs), *report)
    print(*map(line, runs), sep="\n")


if __name__ == "__main__":
    main()
