"""What an adapter loses if its backbone is quantized: held-out loss on ARC-Easy after training on ARC.

    GATERA_DATA=… python -m benchmarks.quantized_backbones [none nf4 int8 …] [--seeds 0 1 2] [--out FILE]

SmolLM2-135M in float32 or stored quantized, GateRA of rank 16, 40 AdamW steps of 8 examples at a learning
rate of 1e-2 with 10 warm-up steps. The loss is the cross-entropy of the correct answers of the first 100
examples of ARC-Easy's test file, nats per token. A seed draws the adapter and the order of examples, the same
for every storage. Results in ``--out`` are not computed again.
"""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.harness.arguments import build_parser, require_data
from benchmarks.harness.fitting import SMOLLM2, arc_data, bare_trainer
from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import TokenGateConfig
from gatera_lightning.adapters.packed_weight import stored_bytes
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport

SETTINGS = ("quantization", "seed", "steps", "examples", "test")
"""The keys that identify a result."""


def fit_and_evaluate(quantization: Any, seed: int, steps: int, examples: int, test: int) -> dict[str, object]:
    """Train and evaluate once; with 0 steps, evaluate the untrained backbone."""
    L.seed_everything(seed, verbose=False)
    backbone = BackboneConfig(id=SMOLLM2, dtype="float32", quantization=quantization)
    module = GateRAModule(
        backbone=backbone,
        adapter=AdapterConfig(update="hira", gate=TokenGateConfig(), rank=16),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=10),
    )
    data = arc_data(validation=16, test=[f"ARC-Easy[:{test}]"], batch_size=examples, seed=seed)
    data.connect(load_tokenizer(backbone))
    report = EvaluationReport()
    trainer = bare_trainer(accelerator="cpu", callbacks=[report], max_steps=steps)
    cpu = time.process_time()
    if steps:
        trainer.fit(module, datamodule=data)
    cpu = time.process_time() - cpu
    trainer.test(module, datamodule=data, verbose=False)
    assert report.result is not None
    return {
        "quantization": quantization,
        "seed": seed,
        "steps": steps,
        "examples": examples,
        "test": test,
        "nats": report.result.gold_loss,
        "accuracy_per_token": report.result.accuracy("per_token").value,
        "weight_megabytes": sum(map(stored_bytes, module.model.parameters())) / 1e6,
        "train_cpu_seconds": cpu,
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("storages", nargs="*", default=["none", "nf4"], metavar="STORAGE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("quantized_backbones.json"))
    args = parser.parse_args()
    require_data()

    results = json.loads(args.out.read_text()) if args.out.is_file() else []
    wanted = [(storage, 0, 0) for storage in args.storages]
    wanted += [(storage, seed, args.steps) for seed in args.seeds for storage in args.storages]
    print("storage       steps  seed  nats/token  accuracy   train CPU s   weights MB")
    for storage, seed, steps in wanted:
        key = (storage, seed, steps, args.examples, args.test)
        found = [result for result in results if tuple(map(result.get, SETTINGS)) == key]
        if not found:
            found = [fit_and_evaluate(*key)]
            results += found
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        result = found[0]
        print(
            f"{storage:<13} {steps:<6} {seed:<5} {result['nats']:<11.4f} "
            f"{result['accuracy_per_token']:<10.3f} {result['train_cpu_seconds']:<13.0f} "
            f"{result['weight_megabytes']:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
