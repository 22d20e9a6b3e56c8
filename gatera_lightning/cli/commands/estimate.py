"""``plan``: what a recipe will cost, memory by part, operations and communication, before any weight is loaded."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gatera_lightning.adapters.inference import prepared_bytes
from gatera_lightning.backbone.loading import load_config, load_tokenizer, native_dtype
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import RecipeCLI
from gatera_lightning.cli.validation import validate_config
from gatera_lightning.cost_model.step_costs import (
    MicroBatch,
    ModelSizes,
    StepCosts,
    build_on_meta,
    model_sizes,
    step_costs,
)
from gatera_lightning.datamodules.batching.statistics import (
    gold_lengths,
    scheduled_lengths,
    supervised_token_counts,
)
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)

_GIB = 2**30


def estimate(argv: Sequence[str]) -> None:
    """Print what a step of a recipe costs each device; everything but ``--memory`` in ``argv`` is as for ``fit``.

    Raises ConfigError for settings that ``fit`` would refuse, and for a model that cannot be carried out without its weights.
    """
    own, others = _parser().parse_known_args(argv)
    if own.memory is not None and not own.memory > 0:  # nan is neither
        raise ConfigError(f"--memory: {own.memory}; accepted: GiB of one device, above 0")
    recipe = RecipeCLI(["fit", *others])
    settings, trainer = recipe.model, recipe.config.fit.trainer
    validate_config(recipe.parser, recipe.config)
    processes, remark = recipe.world_size, recipe.world_size_remark
    layout = layout_of(trainer.strategy, processes)
    batch, source = _largest_micro_batch(recipe, processes, trainer.accumulate_grad_batches)
    here = torch.cuda.is_available()
    gpu = str(trainer.accelerator) in ("gpu", "cuda") or (trainer.accelerator == "auto" and here)
    device_type, dtype = "cuda" if gpu else "cpu", settings.backbone.dtype
    if dtype == "auto":  # a GPU that is not here multiplies bfloat16, as every recent one does
        dtype = "bfloat16" if gpu and not here else str(native_dtype(device_type)).removeprefix("torch.")
    dtype = getattr(torch, dtype)
    model = build_on_meta(load_config(settings.backbone), settings.backbone, settings.adapter, dtype)
    sizes, costs = (
        model_sizes(model),
        step_costs(model, batch, recomputed=settings.backbone.gradient_checkpointing),
    )
    memory = predict_memory(sizes, costs, layout)
    print(
        f"{settings.backbone.id}, {settings.adapter.update} × {settings.adapter.gate.kind}, rank {settings.adapter.rank}"
    )
    print(f"  devices        {layout}{remark}")
    masters = settings.adapter.adapter_dtype
    trainable = sizes.adapter // getattr(torch, masters).itemsize
    frozen = sizes.frozen // dtype.itemsize
    kind = str(dtype).removeprefix("torch.")
    print(
        f"  parameters     {frozen:,} frozen in {kind}, {trainable:,} trainable in {masters} ({trainable / frozen:.2%})"
    )
    print(
        f"  micro-batch    {batch.rows} rows of {batch.tokens} tokens, {batch.targets:,} with loss ({source})"
    )
    print("  memory of a device, GiB")
    for name, part in memory.parts.items():
        print(f"    {name:<13}{part / _GIB:8.2f}")
    limit = own.memory * _GIB if own.memory else _device_memory(device_type)
    print(f"    {'peak':<13}{memory.peak / _GIB:8.2f}{verdict(memory, limit)}")
    tokens = batch.rows * batch.tokens
    flops, steps = costs.forward_flops + costs.backward_flops, trainer.accumulate_grad_batches
    print(
        f"  compute        {flops / tokens / 1e9:.2f} GFLOP a token (forward {costs.forward_flops / tokens / 1e9:.2f}), "
        f"{steps * flops / 1e12:.2f} TFLOP a step and device"
    )
    if settings.adapter.gate.has_thresholds:
        print(
            "                 with every gate undecided; what skip_below and merge_above leave out depends on the gates"
        )
    decoding = settings.decoding
    kept = prepared_bytes(model, with_thresholds=decoding.uses_gate_thresholds)
    if kept and layout.shards == 1 and decoding.prepared:
        print(
            f"  generating     {kept / _GIB:.2f} GiB more for prepared weights (model.decoding.prepared), and keys and values"
        )
    moved = communication(sizes, layout, steps)
    print(
        "  communication  "
        + (", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in moved.items()) or "none")
    )


@dataclass(frozen=True)
class Layout:
    """How processes share a model: ``replicas`` of it, each in ``shards`` parts."""

    replicas: int
    shards: int
    offload: bool = False

    def __str__(self) -> str:
        if self.shards == 1:
            return (
                "1 process"
                if self.replicas == 1
                else f"{self.replicas} processes, each with the whole model (DDP)"
            )
        kind = "FSDP2" if self.replicas == 1 else f"HSDP, {self.replicas} copies"
        where = ", kept on the CPU" if self.offload else ""
        return f"{self.replicas * self.shards} processes, {self.shards} shards ({kind}{where})"


def layout_of(strategy: Any, processes: int) -> Layout:
    """The layout of a configured strategy. Raises ConfigError when its sizes are not those of the processes."""
    if not (
        hasattr(strategy, "get") and str(strategy.get("class_path", "")).endswith("AdapterShardingStrategy")
    ):
        return Layout(processes, 1)
    given = strategy.get("init_args") or {}
    replicas, shards = given.get("replicate_size", 1), given.get("shard_size", "auto")
    if problems := AdapterShardingStrategy(shards, replicas).problems(processes):
        raise ConfigError(problems)
    return Layout(replicas, processes // replicas, bool(given.get("cpu_offload", False)))


@dataclass(frozen=True)
class Memory:
    """Bytes of one device: by part, and at the worst moment."""

    parts: dict[str, int]
    peak: int


def predict_memory(sizes: ModelSizes, costs: StepCosts, layout: Layout) -> Memory:
    """Memory of one device.

    Weights: the device's shard, and whole: the root group, which stays for backward, and two decoder layers, the one at work
    and the next one, fetched ahead. Moments: AdamW's two, in fp32. Peak: what lies there all the time, and the largest of a
    step's worst moment, of AdamW's own two temporaries beside the gradients, and of the beginning of a sharded forward: what
    the root group was received in is kept until the first layer has been received.
    """
    shards = layout.shards
    resident = sizes.frozen if shards == 1 else (0 if layout.offload else sizes.frozen // shards)
    gathered = 0 if shards == 1 else sizes.root + 2 * max(sizes.layers)
    adapter = 0 if layout.offload else sizes.adapter // shards
    beginning = 0 if shards == 1 else 2 * sizes.root + max(sizes.layers)
    worst = costs.peak - sizes.adapter + sizes.adapter // shards  # the gradients in it are sharded too
    parts = {
        "weights": resident + gathered,
        "adapter": adapter,
        "gradients": adapter,
        "moments": 2 * adapter,
        "activations": costs.activations,
        "logits": costs.logits,
    }
    return Memory(parts, resident + 3 * adapter + max(gathered + max(worst, 3 * adapter), beginning))


def communication(sizes: ModelSizes, layout: Layout, micro_batches: int) -> dict[str, int]:
    """Bytes that one device receives in an optimizer step, by operation."""
    shards, replicas = layout.shards, layout.replicas
    found = {}
    if shards > 1:  # decoder layers are fetched for forward and for backward, the root group once
        fetched = 2 * sum(sizes.layers) + sizes.root + 2 * sizes.adapter
        found["all-gather"] = micro_batches * fetched * (shards - 1) // shards
        found["reduce-scatter"] = micro_batches * sizes.adapter * (shards - 1) // shards
    if replicas > 1:  # under DDP once a step, since accumulation does without
        times = micro_batches if shards > 1 else 1
        found["all-reduce"] = times * 2 * (sizes.adapter // shards) * (replicas - 1) // replicas
    return found


def verdict(memory: Memory, limit: float | None) -> str:
    """Whether it fits, and if not, by how much and what to do."""
    if limit is None:
        return "    (--memory GiB says whether it fits)"
    if memory.peak <= limit:
        return f"    of {limit / _GIB:.1f}: fits"
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    hints = {
        "weights": "shard them (overlays/fsdp.yaml), over more devices, or with cpu_offload",
        "activations": "model.backbone.gradient_checkpointing: true if it is not, or more trainer.accumulate_grad_batches",
        "logits": "more trainer.accumulate_grad_batches",
    }
    advice = hints.get(largest, "a smaller model.adapter.rank")
    over = (memory.peak - limit) / _GIB
    return f"    of {limit / _GIB:.1f}: DOES NOT FIT, by {over:.1f} GiB; most of it is {largest}: {advice}"


def _largest_micro_batch(recipe: RecipeCLI, processes: int, accumulate: int) -> tuple[MicroBatch, str]:
    """The micro-batch of the plan with the most positions; without the rows, the worst that the settings allow."""
    data = recipe.datamodule
    try:
        data.connect(load_tokenizer(recipe.model.backbone))
        recipe.set_up_data("fit", processes)
    except ConfigError as error:
        if data.batch_size < accumulate * processes:
            raise ConfigError(
                f"data.batch_size: {data.batch_size} rows a step cannot fill accumulate_grad_batches {accumulate} × "
                f"{processes} processes; accepted: at least {accumulate * processes}"
            ) from error
        log.warning("planned without the rows, which cannot be read: %s", error)
        rows = -(-data.batch_size // (accumulate * processes))
        targets = rows * data.max_length // (1 if data.train_on == "all" else 2)
        return MicroBatch(
            rows, data.max_length, targets
        ), "no rows to be had here: all of max_length, half of it with loss"
    batches = data.train_dataloader().dataset
    lengths = scheduled_lengths(batches.steps, gold_lengths(batches.table.examples), batches.pack_length)
    rows_of = [rows for step in batches.steps for rows in step.micro_batches]
    lines, most = max(zip(lengths, rows_of, strict=True), key=lambda both: len(both[0]) * max(both[0]))
    counts = supervised_token_counts(batches.table.examples.select(most), data.train_on)
    return MicroBatch(len(lines), max(lines), sum(counts)), "the largest of the plan"


def _device_memory(device_type: str) -> float | None:
    here = device_type == "cuda" and torch.cuda.is_available()
    return float(torch.cuda.get_device_properties(0).total_memory) if here else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} estimate",
        usage="%(prog)s [--memory GIB] [--config CONFIG ...] [any flag of fit]",
        description="Say what a recipe costs each device: memory by part, operations, communication. Loads no weights.",
        epilog=f"Every other flag is as for fit: see {PROGRAM} fit --help",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--memory", type=float, help="GiB of one device; default: of the GPU that is here, if any"
    )
    return parser
