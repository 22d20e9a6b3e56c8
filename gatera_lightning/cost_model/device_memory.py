"""Predicted memory and communication of one device, for every way to distribute a model."""

from dataclasses import dataclass

from gatera_lightning.cost_model.step_costs import ModelSizes, StepCosts

GIB = 2**30
"""Bytes of a GiB."""


@dataclass(frozen=True)
class Layout:
    """How ranks share a model."""

    replicas: int
    """Copies of the model."""

    shards: int
    """Ranks over which each copy is sharded."""

    offload: bool = False
    """Whether the shards are stored on the CPU."""

    def __str__(self) -> str:
        if self.shards == 1:
            return (
                "1 rank" if self.replicas == 1 else f"{self.replicas} ranks, each with the full model (DDP)"
            )
        kind = "FSDP2" if self.replicas == 1 else f"HSDP, {self.replicas} copies"
        where = ", stored on the CPU" if self.offload else ""
        return f"{self.replicas * self.shards} ranks, {self.shards} shards ({kind}{where})"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parts: dict[str, int]
    """By part: weights, adapter, gradients, moments, activations, logits."""

    peak: int
    """Peak allocated memory."""


def predict_memory(sizes: ModelSizes, costs: StepCosts, layout: Layout) -> Memory:
    """Predict the memory of one device.

    - Weights: the device's shard, and what is gathered in full: the root group, which stays until its
      backward, and two decoder layers, the one that is computed and the next one, which is prefetched.
    - Moments: AdamW's two, in fp32.
    - Peak: what is always allocated, and the largest of these: the peak of a micro-batch; AdamW's two
      temporaries with the gradients; the start of a sharded forward pass, when the buffer that received the
      root group lives until the first layer has been received.

    Args:
        sizes: Bytes of the model's parameters.
        costs: Costs of one micro-batch.
        layout: How ranks share the model.
    """
    shards = layout.shards
    resident = sizes.frozen if shards == 1 else (0 if layout.offload else sizes.frozen // shards)
    gathered = 0 if shards == 1 else sizes.root + 2 * max(sizes.layers)
    adapter = 0 if layout.offload else sizes.adapter // shards
    forward_start = 0 if shards == 1 else 2 * sizes.root + max(sizes.layers)
    step_peak = (
        costs.peak - sizes.adapter + sizes.adapter // shards
    )  # it includes gradients, which are sharded too
    parts = {
        "weights": resident + gathered,
        "adapter": adapter,
        "gradients": adapter,
        "moments": 2 * adapter,
        "activations": costs.activations,
        "logits": costs.logits,
    }
    return Memory(parts, resident + 3 * adapter + max(gathered + max(step_peak, 3 * adapter), forward_start))


def communication(sizes: ModelSizes, layout: Layout, micro_batches: int) -> dict[str, int]:
    """Return the bytes that one device receives in an optimizer step, by collective operation.

    Args:
        sizes: Bytes of the model's parameters.
        layout: How ranks share the model.
        micro_batches: Micro-batches per optimizer step and rank.
    """
    shards, replicas = layout.shards, layout.replicas
    found = {}
    if shards > 1:  # decoder layers are gathered for forward and for backward, the root group once
        gathered = 2 * sum(sizes.layers) + sizes.root + 2 * sizes.adapter
        found["all-gather"] = micro_batches * gathered * (shards - 1) // shards
        found["reduce-scatter"] = micro_batches * sizes.adapter * (shards - 1) // shards
    if replicas > 1:  # DDP accumulates gradients locally and reduces them once per step
        times = micro_batches if shards > 1 else 1
        found["all-reduce"] = times * 2 * (sizes.adapter // shards) * (replicas - 1) // replicas
    return found
