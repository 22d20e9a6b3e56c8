"""``plan``: what a recipe will cost, memory by part, operations and communication, before any weight is loaded."""

import argparse
import logging
from collections.abc import Sequence
from typing import Any

import torch

from gatera_lightning.adapters.inference import prepared_bytes
from gatera_lightning.backbone.loading import load_config, load_tokenizer, native_dtype
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import RecipeCLI
from gatera_lightning.cli.validation import validate_config
from gatera_lightning.cost_model.device_memory import GIB, Layout, communication, predict_memory, verdict
from gatera_lightning.cost_model.step_costs import MicroBatch, build_on_meta, model_sizes, step_costs
from gatera_lightning.datamodules.batching.statistics import (
    gold_lengths,
    scheduled_lengths,
    supervised_token_counts,
)
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)


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
        f"  micro-batch    {batch.sequences} rows of {batch.length} tokens, {batch.supervised_tokens:,} with loss ({source})"
    )
    print("  memory of a device, GiB")
    for name, part in memory.parts.items():
        print(f"    {name:<13}{part / GIB:8.2f}")
    limit = own.memory * GIB if own.memory else _device_memory(device_type)
    print(f"    {'peak':<13}{memory.peak / GIB:8.2f}{verdict(memory, limit)}")
    tokens = batch.tokens
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
            f"  generating     {kept / GIB:.2f} GiB more for prepared weights (model.decoding.prepared), and keys and values"
        )
    moved = communication(sizes, layout, steps)
    print(
        "  communication  "
        + (", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in moved.items()) or "none")
    )


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
