"""What an adapter loses if its backbone is quantized: held-out loss on ARC-Easy after training on ARC.

    GATERA_DATA=… python -m benchmarks.quantized_backbones [none nf4 int8 …] \\
        [--methods gatera lora peft_lora] [--seeds 0 1 2] [--out FILE]

SmolLM2-135M in float32 or stored quantized, rank 16, 40 AdamW steps of 8 examples with 10 warm-up steps. The
loss is the cross-entropy of the correct answers of the first 100 examples of ARC-Easy's test file, nats per
token. A seed draws the adapter and the order of examples, the same for every storage and both LoRAs. Results
in ``--out`` are not computed again.

gatera      GateRA, learning rate 1e-2
lora        this library's LoRA without a gate, 2e-3
peft_lora   the reference, 2e-3: PEFT's LoRA over the dense model, or over bitsandbytes' own ``Linear4bit``
            (``nf4``), in a plain loop; it starts with the values of ``lora``

If ``peft_lora`` loses as much from ``none`` to ``nf4`` as ``lora``, the loss is that of the storage. The
reference prints the largest difference between its frozen weights and those of ``lora``, and the largest
difference of a training loss. ``--keep-dense down_proj`` leaves layers of the reference in float32.
"""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L

from benchmarks.harness.arguments import build_parser, require_data
from benchmarks.harness.fitting import SMOLLM2, arc_data, bare_trainer
from benchmarks.harness.peft_reference import copy_start, fit_and_evaluate_reference, reference_model
from gatera_lightning import AdapterConfig, BackboneConfig, GateRAModule, OptimizerConfig
from gatera_lightning.adapters.gates import NoGateConfig, TokenGateConfig
from gatera_lightning.adapters.packed_weight import stored_bytes
from gatera_lightning.backbone.loading import load_tokenizer
from gatera_lightning.callbacks.evaluation_report import EvaluationReport

SETTINGS = ("method", "quantization", "seed", "steps", "examples", "test", "keep_dense")
"""The keys that identify a result."""

LORA = AdapterConfig(update="lora", gate=NoGateConfig(), rank=16)
ADAPTERS = {"gatera": AdapterConfig(update="hira", gate=TokenGateConfig(), rank=16), "lora": LORA}
LEARNING_RATES = {"gatera": 1e-2, "lora": 2e-3, "peft_lora": 2e-3}
WARMUP_STEPS = 10
REFERENCE_STORAGES = ("none", "nf4")


class LossHistory(L.Callback):
    """Collects the training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Read the loss that the module has logged."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit_and_evaluate(
    method: str, quantization: Any, seed: int, steps: int, examples: int, test: int, keep_dense: list[str]
) -> dict[str, Any]:
    """Train and evaluate once; with 0 steps, evaluate the untrained backbone."""
    L.seed_everything(seed, verbose=False)
    backbone = BackboneConfig(id=SMOLLM2, dtype="float32", quantization=quantization)
    module = GateRAModule(
        backbone=backbone,
        adapter=ADAPTERS.get(method, LORA),
        optimizer=OptimizerConfig(lr=LEARNING_RATES[method], warmup_steps=WARMUP_STEPS),
    )
    data = arc_data(validation=16, test=[f"ARC-Easy[:{test}]"], batch_size=examples, seed=seed)
    data.connect(load_tokenizer(backbone))
    module.configure_model()
    megabytes = sum(map(stored_bytes, module.model.parameters())) / 1e6
    result = dict(zip(SETTINGS, (method, quantization, seed, steps, examples, test, keep_dense), strict=True))
    cpu = time.process_time()
    if method == "peft_lora":
        reference = reference_model(SMOLLM2, LORA, nf4=quantization == "nf4", keep_dense=keep_dense)
        difference = copy_start(module.model, reference)
        del module
        losses, nats = fit_and_evaluate_reference(
            reference, data, steps=steps, lr=LEARNING_RATES[method], warmup_steps=WARMUP_STEPS
        )
        result |= {"largest_weight_difference": difference}
    else:
        report, history = EvaluationReport(), LossHistory()
        trainer = bare_trainer(accelerator="cpu", callbacks=[report, history], max_steps=steps)
        if steps:
            trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
        assert report.result is not None
        assert report.result.gold_loss is not None
        losses, nats = history.losses, report.result.gold_loss
        result |= {"accuracy_per_token": report.result.accuracy("per_token").value}
    return result | {
        "nats": nats,
        "losses": losses,
        "weight_megabytes": None if method == "peft_lora" else megabytes,
        "cpu_seconds": time.process_time() - cpu,
    }


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("storages", nargs="*", default=["none", "nf4"], metavar="STORAGE")
    parser.add_argument("--methods", nargs="+", choices=LEARNING_RATES, default=["gatera"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--keep-dense", nargs="+", default=[], metavar="MODULE", help="of peft_lora only")
    parser.add_argument("--out", type=Path, default=Path("quantized_backbones.json"))
    args = parser.parse_args()
    require_data()
    if "peft_lora" in args.methods and (unknown := sorted(set(args.storages) - set(REFERENCE_STORAGES))):
        parser.error(f"peft_lora over {unknown[0]}; accepted: {', '.join(REFERENCE_STORAGES)}")
    if args.keep_dense and args.methods != ["peft_lora"]:
        parser.error("--keep-dense needs --methods peft_lora")

    results = json.loads(args.out.read_text()) if args.out.is_file() else []
    wanted = [(method, storage, 0, 0) for method in args.methods for storage in args.storages]
    wanted += [
        (method, storage, seed, args.steps)
        for seed in args.seeds
        for method in args.methods
        for storage in args.storages
    ]
    print("method     storage       steps  seed  nats/token  CPU s   weights MB")
    for settings in wanted:
        key = (*settings, args.examples, args.test, args.keep_dense)
        result = _find(results, key)
        if result is None:
            result = fit_and_evaluate(*key)
            results.append(result)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
        method, storage, seed, steps = settings
        remark = (
            _compare_with_own(result, _find(results, ("lora", *key[1:]))) if method == "peft_lora" else ""
        )
        megabytes = "–" if result["weight_megabytes"] is None else f"{result['weight_megabytes']:.0f}"
        print(
            f"{method:<10} {storage:<13} {steps:<6} {seed:<5} {result['nats']:<11.4f} "
            f"{result['cpu_seconds']:<7.0f} {megabytes}{remark}",
            flush=True,
        )


def _find(results: list[dict[str, Any]], key: tuple[Any, ...]) -> dict[str, Any] | None:
    return next((result for result in results if tuple(map(result.get, SETTINGS)) == key), None)


def _compare_with_own(reference: dict[str, Any], own: dict[str, Any] | None) -> str:
    """Describe how far the reference is from this library's LoRA of the same run, if that was run."""
    remark = f"   weights differ by {reference['largest_weight_difference']:.1e}"
    if own is None or not own["losses"]:
        return remark
    steps = zip(reference["losses"], own["losses"], strict=True)
    return f"{remark}, training losses by {max(abs(a - b) for a, b in steps):.1e}"


if __name__ == "__main__":
    main()
