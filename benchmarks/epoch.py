"""How long an epoch of real examples takes: our loop, and Hugging Face's Trainer with PEFT.

    GATERA_DATA=… python -m benchmarks.epoch [--examples 256] [--rounds 3] [--only gatera hf_lora] \\
        [--out results/epoch.json]

SmolLM2-135M, rank 16 on q, k, v, up, down, AdamW, clipping at 1, linear decay to 0 after a tenth of the
steps. ``gatera``, ``hira`` and ``lora`` are GateRAModule with a data module in Lightning's Trainer;
``hf_lora`` and ``hf_hira`` are PEFT in transformers.Trainer. None has a logger, checkpoints or validation.
All get the same token ids and labels, from our tables, and see every example once, in the same number of
steps. Each run is a process of its own with one thread, contenders run in turns, and round n has seed n.

The loops differ in what their users get. Ours forms batches of examples of similar length and computes logits
at supervised positions; Hugging Face's draws examples at random, pads to the longest of a batch, and computes
the logits of every token. Variants separate these differences; they run only if they are named in ``--only``:

hf_lora_by_length         groups by length, an option of Hugging Face's that does nothing below eight
batches gatera_mixed, lora_mixed  random examples, of which those of a step are grouped into four
micro-batches by length gatera_packed             random examples, packed gatera_saturated          skips
matmuls of tokens with saturated gates, as overlays/hardware/fast_saturated.yaml

Smaller differences: Hugging Face's AdamW is fused, its learning rate starts at 0 and ours at 1/(warm-up +
1) of the peak, each library has its own initial values of A, and in bfloat16 Hugging Face's runs under
autocast.

Seconds are those from the first batch to the last step. ``set-up``, CPU seconds too, is the time for
backbone, adapter, tables and trainer. ``padding`` is its share of the positions that went through the
model, ``head`` the share of the positions that went through the output head. Before and after training, a
loop's own loss of a batch must equal that of one plain function, which also computes the loss of the
validation split: test files of the same tasks, and other personas.
"""

import json
import logging
import math
import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets.utils.logging import disable_progress_bar
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from benchmarks.harness.arguments import add_dtype, build_parser, require_data
from benchmarks.harness.fitting import SMOLLM2
from benchmarks.harness.interleaving import format_ratio
from benchmarks.harness.machine import DEVICE, describe_machine
from benchmarks.harness.mixed_examples import MixedExamples
from benchmarks.harness.monitoring import LoopMonitor
from benchmarks.harness.training_loops import LOOPS, LoopSettings, TrainingLoop
from gatera_lightning.backbone.loading import load_backbone, load_tokenizer, native_dtype
from gatera_lightning.datamodules import Batch
from gatera_lightning.datamodules.batch import IGNORE_INDEX

VARIANTS = ("gatera_saturated", "gatera_mixed", "lora_mixed", "gatera_packed", "hf_lora_by_length")


@torch.no_grad()
def plain_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the cross-entropy loss (nats per token) by its definition, without code of either loop."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:].flatten()
        logits = logits.float().flatten(0, 1)
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"))
        count += int((labels != IGNORE_INDEX).sum())
    return total / count


def check_loss(loop: TrainingLoop, batch: Batch, settings: LoopSettings) -> float:
    """Return the loss that a loop trains.

    Raises:
        AssertionError: If it is not :func:`plain_loss` of the model.
    """
    with torch.no_grad():
        own = float(loop.loss(batch))
    plain = plain_loss(loop.model, [batch])
    tolerance = 1e-4 if settings.dtype == "float32" else 1e-2
    assert math.isclose(own, plain, rel_tol=tolerance), f"the loop's loss {own} is not {plain}"
    return own


def load_data(settings: LoopSettings, seed: int, **layout: bool) -> MixedExamples:
    """Return the tokenized data."""
    data = MixedExamples(
        train_examples=settings.train_examples,
        validation_examples=settings.validation_examples,
        batch_size=settings.batch_size,
        seed=seed,
        **layout,
    )
    data.connect(load_tokenizer(settings.backbone_config()))
    data.setup("fit")
    return data


def validation_batches(data: MixedExamples) -> list[Batch]:
    """Return the batches of the validation split, on the device."""
    batches: list[Any] = list(data.val_dataloader())
    return [
        {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for batch in batches
    ]


def save_untrained(settings: LoopSettings, folder: str) -> float:
    """Return the validation loss of the backbone, and save it: reading a GGUF file takes 20 s each time."""
    silence_libraries()
    data = load_data(settings, 0)
    model: Any = load_backbone(settings.backbone_config(), DEVICE)
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return plain_loss(model.to(DEVICE), validation_batches(data))


def run_epoch(name: str, settings: LoopSettings, seed: int) -> dict[str, float]:
    """Set up, train for one epoch, and validate; return what was measured."""
    silence_libraries()
    times = [time.process_time()]
    packed = name == "gatera_packed"
    data = load_data(settings, seed, packing=packed, group_by_length=not (packed or name.endswith("_mixed")))
    loop = LOOPS[name](data, settings, seed)
    times.append(time.process_time())

    batches = validation_batches(data)
    first_loss = check_loss(loop, batches[0], settings)
    monitor = LoopMonitor(loop.model.to(DEVICE))
    times.append(time.process_time())
    steps = loop.train(monitor)
    times.append(time.process_time())
    loop.model.to(DEVICE)  # Lightning moves it to the CPU
    check_loss(loop, batches[0], settings)
    lengths = [len(example["input_ids"]) for example in data.token_lists()]
    return {
        "cpu": monitor.cpu,
        "wall": monitor.wall,
        "setup_cpu": times[1] - times[0] + times[3] - times[2] - monitor.cpu,
        "peak_bytes": monitor.peak_bytes,
        "steps": steps,
        "rows": len(lengths),
        "tokens": sum(lengths),
        "positions": monitor.positions,
        "head_positions": monitor.head_positions,
        "first_loss": first_loss,
        "nats": plain_loss(loop.model, batches),
    }


def silence_libraries() -> None:
    """Use one thread, and turn off warnings, log messages and progress bars."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def in_new_process(call: Callable[..., Any], *args: Any) -> Any:
    """Return what ``call`` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--examples", type=int, default=256, help="to train on, a quarter from each source")
    parser.add_argument("--validation", type=int, default=64, help="validation examples, likewise")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    add_dtype(parser, default=str(native_dtype(DEVICE)).removeprefix("torch."))
    parser.add_argument("--backbone", default=SMOLLM2)
    parser.add_argument("--rounds", type=int, default=3)
    default = [name for name in LOOPS if name not in VARIANTS]
    parser.add_argument("--only", nargs="+", choices=tuple(LOOPS), default=default)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    require_data()

    os.environ["TQDM_DISABLE"] = "1"
    settings = LoopSettings(
        args.backbone, args.dtype, args.examples, args.validation, args.batch_size, args.rank
    )
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        untrained = in_new_process(save_untrained, settings, folder)
        for seed in range(args.rounds):
            for name in args.only:
                run = in_new_process(run_epoch, name, replace(settings, backbone=folder), seed)
                runs[name].append(run)
                message = f"round {seed}, {name}: {run['cpu']:.1f} CPU s, {run['nats']:.4f} nats"
                print(message, file=sys.stderr, flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": describe_machine(),
            "settings": vars(settings),
            "untrained_nats": untrained,
            "results": runs,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n")
    print_table(runs, untrained)


def print_table(runs: dict[str, list[dict[str, float]]], untrained: float) -> None:
    """Print medians over the rounds; ratios and validation losses with the lowest and the highest."""
    first = next(iter(runs.values()))[0]
    reference = "hf_lora" if "hf_lora" in runs else next(iter(runs))
    print(describe_machine())
    print(f"{first['rows']} examples of {first['tokens']} tokens; untrained: {untrained:.3f} nats per token")
    losses = [f"{name} {own[0]['first_loss']:.4f}" for name, own in runs.items()]
    print(f"loss of one batch before training, as each loop computes it: {', '.join(losses)}\n")
    against = f"÷ {reference}"
    print(
        f"{'':<18}{'CPU s':>9}  {against:<22}{'wall s':>8}  {against:<22}{'steps':>5}{'positions':>11}"
        f"{'padding':>9}{'head':>6}{'peak MB':>9}{'set-up':>8}  nats"
    )
    for name, own in runs.items():
        by_round = {key: [run[key] for run in own] for key in first}
        cpu, wall = (
            format_ratio(by_round[clock], [run[clock] for run in runs[reference]])
            for clock in ("cpu", "wall")
        )
        median = {key: statistics.median(values) for key, values in by_round.items()}
        positions, nats = median["positions"], by_round["nats"]
        print(
            f"{name:<18}{median['cpu']:>9.1f}  {cpu:<22}{median['wall']:>8.1f}  {wall:<22}"
            f"{median['steps']:>5.0f}{positions:>11.0f}{1 - median['tokens'] / positions:>9.1%}"
            f"{median['head_positions'] / positions:>6.0%}{median['peak_bytes'] / 1e6:>9.0f}"
            f"{median['setup_cpu']:>8.1f}  {median['nats']:.3f} ({min(nats):.3f} to {max(nats):.3f})"
        )


if __name__ == "__main__":
    main()
