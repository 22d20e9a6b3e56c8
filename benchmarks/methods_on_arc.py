"""What each method and learning rate reaches in 80 steps on ARC and OpenBookQA, with SmolLM2-135M on a CPU.

    GATERA_DATA=… python -m benchmarks.methods_on_arc gatera:1e-2 hira:1e-2 lora:2e-3 --seeds 0 1 2 \\
        --out results.json

Trains on ARC-Easy, ARC-Challenge and the first 2,000 examples of OpenBookQA, except 16 (prompt ``Question:
{q}\\nAnswer:``, answer the option's text and EOS): 80 steps of 16 examples, rank 16 on q, k, v, up, down,
linear decay after 10 warm-up steps, clipping at 1. Evaluates on the first 300 examples of ARC-Easy's test
file: cross-entropy loss of the correct answers (nats per token), and accuracy by per-token likelihood with
its 95 % interval. All methods share data, order of examples and schedule; only the learning rate is each
method's own, and every one that was tried is printed. Results in ``--out`` are not computed again.
"""

import json
import time
from pathlib import Path

import lightning as L
import torch

from benchmarks.harness.arguments import add_dtype, build_parser, require_data
from benchmarks.harness.fitting import SMOLLM2, arc_data, bare_trainer
from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import GateConfig, NoGateConfig, TokenGateConfig
from gatera_lightning.backbone.loading import load_tokenizer, native_dtype
from gatera_lightning.callbacks.evaluation_report import EvaluationReport

UPDATES = {"gatera": "hira", "hira": "hira", "lora": "lora", "dora": "dora"}
"""Method -> its update; only GateRA has a gate."""

SETTINGS = ("backbone", "dtype", "method", "lr", "seed", "steps", "entropy_weight")
"""The keys that identify a result."""


def fit_and_evaluate(
    method: str, lr: float, seed: int, steps: int, entropy_weight: float, backbone: BackboneConfig
) -> dict[str, object]:
    """Train and evaluate once; with 0 steps, evaluate the untrained backbone."""
    L.seed_everything(seed, verbose=False)
    gated = method == "gatera"
    gate: GateConfig = TokenGateConfig(entropy_weight=entropy_weight) if gated else NoGateConfig()
    module = GateRAModule(
        backbone=backbone,
        adapter=AdapterConfig(update=UPDATES[method], gate=gate, rank=16),
        optimizer=OptimizerConfig(lr=lr, warmup_steps=10),
    )
    # The 16 validation examples are not used: they would have been trained on.
    data = arc_data(validation=16, test=["ARC-Easy[:300]"], batch_size=16, seed=seed)
    data.connect(load_tokenizer(backbone))
    report = EvaluationReport()
    trainer = bare_trainer(accelerator="cpu", callbacks=[report], max_steps=steps)
    started, cpu = time.perf_counter(), time.process_time()
    if steps:
        trainer.fit(module, datamodule=data)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    trainer.test(module, datamodule=data, verbose=False)
    result = report.result
    assert result is not None
    accuracy = result.accuracy("per_token")
    return {
        "backbone": backbone.id,
        "method": method if steps else "untrained",
        "lr": lr,
        "seed": seed,
        "steps": steps,
        "entropy_weight": entropy_weight if gated else None,
        "nats": result.gold_loss,
        "accuracy_per_token": accuracy.value,
        "interval": accuracy.interval,
        "accuracy_sum": result.accuracy("sum").value,
        "train_seconds": seconds,
        "train_cpu_seconds": cpu_seconds,
        "torch": torch.__version__,
        "dtype": backbone.dtype,
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument(
        "runs", nargs="*", default=["gatera:1e-2"], metavar="METHOD:LR", help=f"one of {', '.join(UPDATES)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--entropy-weight", type=float, default=0.01)
    parser.add_argument("--backbone", default=SMOLLM2)
    add_dtype(parser, default=str(native_dtype("cpu")).removeprefix("torch."))
    parser.add_argument("--out", type=Path, default=Path("methods_on_arc.json"))
    args = parser.parse_args()
    require_data()

    backbone = BackboneConfig(id=args.backbone, dtype=args.dtype)
    results = json.loads(args.out.read_text()) if args.out.is_file() else []
    wanted = [("gatera", 0.0, 0, 0)] + [
        (run.split(":")[0], float(run.split(":")[1]), seed, args.steps)
        for run in args.runs
        for seed in args.seeds
    ]
    print("method     lr       seed  nats/token  accuracy per token     train CPU s")
    for method, lr, seed, steps in wanted:
        name, weight = method if steps else "untrained", args.entropy_weight if method == "gatera" else None
        key = (args.backbone, args.dtype, name, lr, seed, steps, weight)
        found = [result for result in results if tuple(map(result.get, SETTINGS)) == key]
        if not found:
            found = [fit_and_evaluate(method, lr, seed, steps, args.entropy_weight, backbone)]
            results += found
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        result = found[0]
        low, high = result["interval"]
        print(
            f"{result['method']:<10} {result['lr']:<8g} {result['seed']:<5} {result['nats']:<11.3f} "
            f"{result['accuracy_per_token']:.3f} [{low:.3f}, {high:.3f}]   {result['train_cpu_seconds']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
