"""`estimate`: memory, FLOPs and communication of a training step, predicted without loading weights."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from gatera_lightning.adapters.inference import prepared_bytes
from gatera_lightning.adapters.packed_weight import PackedWeight
from gatera_lightning.backbone.loading import load_config, load_tokenizer, native_dtype
from gatera_lightning.backbone.quantization import stored_quantization
from gatera_lightning.cli import PROGRAM
from gatera_lightning.cli.dry_run import RecipeCLI
from gatera_lightning.cli.subcommand_parser import SubcommandParser
from gatera_lightning.cli.validation import validate_config
from gatera_lightning.cost_model.device_memory import GIB, Layout, Memory, communication, predict_memory
from gatera_lightning.cost_model.saturated_gates import half_open, saved_flops
from gatera_lightning.cost_model.step_costs import (
    MicroBatch,
    ModelSizes,
    StepCosts,
    build_on_meta,
    model_sizes,
    step_costs,
)
from gatera_lightning.datamodules.batching.batch_schedule import batch_size_problems
from gatera_lightning.datamodules.batching.statistics import (
    gold_lengths,
    scheduled_lengths,
    supervised_token_counts,
)
from gatera_lightning.distributed.sharding import AdapterShardingStrategy
from gatera_lightning.errors import ConfigError
from gatera_lightning.terminal.printing import print_text

log = logging.getLogger(__name__)


def estimate(argv: Sequence[str]) -> None:
    """Print what a training step of a recipe costs each device.

    Args:
        argv: `--memory`, and any flags of `fit`.

    Raises:
        ConfigError: `fit` would reject the settings, or the model cannot run without its weights.
    """
    args, fit_flags = _parser().parse_before_fit(argv)
    if args.memory is not None and not args.memory > 0:  # rejects nan as well
        raise ConfigError(f"--memory: {args.memory}; accepted: GiB of one device, above 0")
    recipe = RecipeCLI(["fit", *fit_flags])
    validate_config(recipe.parser, recipe.config)
    trainer = recipe.config.fit.trainer
    layout = layout_of(trainer.strategy, recipe.world_size)
    batch, source = _largest_micro_batch(recipe)
    device_type = _device_type(trainer.accelerator)
    dtype = _backbone_dtype(recipe.model.backbone.dtype, device_type)
    hf_config = load_config(recipe.model.backbone)
    model = build_on_meta(hf_config, recipe.model.backbone, recipe.model.adapter, dtype)
    sizes = model_sizes(model)
    costs = step_costs(
        model,
        batch,
        recomputed=recipe.model.backbone.gradient_checkpointing,
        objectives=recipe.model.objectives,
    )
    limit = args.memory * GIB if args.memory else _memory_of_device(device_type)
    for line in [
        *_describe_recipe(recipe, layout, model, sizes, dtype, stored_quantization(hf_config)),
        f"  micro-batch    {batch.sequences} rows of {batch.length} tokens, "
        f"{batch.supervised_tokens:,} supervised ({source})",
        *_describe_memory(sizes, costs, layout, limit),
        *_describe_compute(recipe, model, batch, costs),
        *_describe_generation(recipe, model, layout),
        *_describe_communication(sizes, layout, recipe.accumulate),
    ]:
        print_text(line)


def layout_of(strategy: Any, world_size: int) -> Layout:
    """Return the layout of a configured strategy.

    Args:
        strategy: `trainer.strategy` as parsed: a name, or a namespace with `class_path` and `init_args`.
        world_size: The number of ranks.

    Raises:
        ConfigError: The strategy's sizes do not fit the number of ranks.
    """
    # Only the last part of the class path is compared: version 0.1 had the class in another module.
    path = strategy.get("class_path", "") if hasattr(strategy, "get") else ""
    if path.rpartition(".")[2] != AdapterShardingStrategy.__name__:
        return Layout(world_size, 1)
    settings = strategy.get("init_args") or {}
    replicas, shards = settings.get("replicate_size", 1), settings.get("shard_size", "auto")
    if problems := AdapterShardingStrategy(shards, replicas).problems(world_size):
        raise ConfigError(problems)
    return Layout(replicas, world_size // replicas, bool(settings.get("cpu_offload", False)))


def _describe_recipe(
    recipe: RecipeCLI,
    layout: Layout,
    model: torch.nn.Module,
    sizes: ModelSizes,
    dtype: torch.dtype,
    stored_as: str | None,
) -> list[str]:
    adapter = recipe.model.adapter
    trainable = sizes.adapter // getattr(torch, adapter.adapter_dtype).itemsize
    frozen = sum(p.numel() for p in model.parameters()) - trainable
    name, quantization = str(dtype).removeprefix("torch."), stored_as or recipe.model.backbone.quantization
    stored = name if quantization == "none" else f"{quantization}, embeddings and head in {name}"
    lines = [
        f"{recipe.model.backbone.id}, {adapter.update} × {adapter.gate.kind}, {adapter.rank_text}",
        f"  devices        {layout}{recipe.world_size_remark}",
        f"  parameters     {frozen:,} frozen in {stored}, "
        f"{trainable:,} trainable in {adapter.adapter_dtype} ({trainable / frozen:.2%})",
    ]
    if quantization != "none" and stored_as is None:
        lines.append(
            f"  loading        {frozen * dtype.itemsize / GIB:.2f} GiB of CPU memory, for the dense weights"
        )
    return lines


def _describe_memory(sizes: ModelSizes, costs: StepCosts, layout: Layout, limit: float | None) -> list[str]:
    memory = predict_memory(sizes, costs, layout)
    parts = [f"    {name:<13}{size / GIB:8.2f}" for name, size in memory.parts.items()]
    peak = f"    {'peak':<13}{memory.peak / GIB:8.2f}{describe_fit(memory, limit)}"
    return ["  memory per device, GiB", *parts, peak]


def describe_fit(memory: Memory, limit: float | None) -> str:
    """Say whether the memory fits a device, and if not, how much is missing and what to change.

    Args:
        memory: The predicted memory.
        limit: Bytes of the device; None if unknown.
    """
    if limit is None:
        return "    (--memory GiB says whether it fits)"
    if memory.peak <= limit:
        return f"    of {limit / GIB:.1f}: fits"
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    hints = {
        "weights": "shard them (overlays/fsdp.yaml), over more devices, or with cpu_offload",
        "activations": "model.backbone.gradient_checkpointing: true if it is not, or more "
        "trainer.accumulate_grad_batches",
        "logits": "more trainer.accumulate_grad_batches",
    }
    advice = hints.get(largest, "a smaller model.adapter.rank")
    over = (memory.peak - limit) / GIB
    return f"    of {limit / GIB:.1f}: DOES NOT FIT, by {over:.1f} GiB; most of it is {largest}: {advice}"


def _describe_compute(
    recipe: RecipeCLI, model: torch.nn.Module, batch: MicroBatch, costs: StepCosts
) -> list[str]:
    flops = costs.forward_flops + costs.backward_flops
    lines = [
        f"  compute        {flops / batch.tokens / 1e9:.2f} GFLOP per token "
        f"(forward {costs.forward_flops / batch.tokens / 1e9:.2f}), "
        f"{recipe.accumulate * flops / 1e12:.2f} TFLOP per step and device"
    ]
    if recipe.model.adapter.gate.has_thresholds:
        lines.append(
            "                 if no gate is saturated; "
            "what skip_below and merge_above save depends on the gates"
        )
    elif shares := half_open(model):
        recomputed = recipe.model.backbone.gradient_checkpointing
        saved = saved_flops(model, batch.tokens, shares, recomputed=recomputed)
        lines.append(
            "                 if every token had the matmuls of a soft gate; "
            f"{recipe.accumulate * (flops - saved) / 1e12:.2f} TFLOP with half of the gates open"
        )
    return lines


def _describe_generation(recipe: RecipeCLI, model: torch.nn.Module, layout: Layout) -> list[str]:
    decoding = recipe.model.decoding
    prepared = prepared_bytes(model, with_thresholds=decoding.uses_gate_thresholds)
    if not prepared or layout.shards > 1 or not decoding.prepared:
        return []
    packed = any(isinstance(parameter, PackedWeight) for parameter in model.parameters())
    dense = ", which are dense" if packed else ""
    return [
        f"  generation     {prepared / GIB:.2f} GiB more for prepared weights "
        f"(model.decoding.prepared{dense}), plus the KV cache"
    ]


def _describe_communication(sizes: ModelSizes, layout: Layout, micro_batches: int) -> list[str]:
    received = communication(sizes, layout, micro_batches)
    sizes_text = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in received.items())
    return [f"  communication  {sizes_text or 'none'}"]


def _largest_micro_batch(recipe: RecipeCLI) -> tuple[MicroBatch, str]:
    """The micro-batch with the most positions and its origin; an upper bound if the data cannot be read."""
    data = recipe.datamodule
    try:
        data.connect(load_tokenizer(recipe.model.backbone))
        recipe.set_up_data("fit", recipe.world_size)
    except ConfigError as error:
        if problems := batch_size_problems(data.batch_size, recipe.accumulate, recipe.world_size):
            raise ConfigError(problems) from error
        log.warning("the data cannot be read, so the batch is estimated from the settings: %s", error)
        sequences = -(-data.batch_size // (recipe.accumulate * recipe.world_size))
        supervised = sequences * data.max_length // (1 if data.train_on == "all" else 2)
        assumption = "all tokens" if data.train_on == "all" else "half of the tokens"
        return MicroBatch(sequences, data.max_length, supervised), (
            f"without data: every row of max_length, {assumption} supervised"
        )
    batches = data.train_dataloader().dataset
    examples = batches.table.examples
    micro_batches = [indices for step in batches.steps for indices in step.micro_batches]
    rows = scheduled_lengths(batches.steps, gold_lengths(examples), batches.pack_length)
    lengths, indices = max(
        zip(rows, micro_batches, strict=True), key=lambda batch: len(batch[0]) * max(batch[0])
    )
    supervised = sum(supervised_token_counts(examples.select(indices), data.train_on))
    return MicroBatch(len(lengths), max(lengths), supervised), "the largest of the batch schedule"


def _device_type(accelerator: Any) -> str:
    is_gpu = str(accelerator) in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    return "cuda" if is_gpu else "cpu"


def _backbone_dtype(setting: str, device_type: str) -> torch.dtype:
    """The dtype that ``auto`` means on the device, which need not be in this machine."""
    if setting != "auto":
        return getattr(torch, setting)
    if device_type == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16  # native on every recent GPU
    return native_dtype(device_type)


def _memory_of_device(device_type: str) -> float | None:
    """Bytes of this machine's GPU; None without one."""
    if device_type == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return None


def _parser() -> SubcommandParser:
    parser = SubcommandParser(
        "estimate",
        usage="%(prog)s [--memory GIB] [--config CONFIG ...] [any flag of fit]",
        description="Predict what a training step costs each device: memory by part, FLOPs and "
        "communication. Loads no weights. plan is another name of this subcommand.",
        epilog=f"All other flags are those of fit: see {PROGRAM} fit --help",
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="memory of one device in GiB; default: that of this machine's GPU, if any",
    )
    return parser
