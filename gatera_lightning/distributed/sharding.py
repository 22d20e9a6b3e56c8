"""Shard a frozen backbone and its trainable adapters with PyTorch FSDP2 under Lightning's Trainer."""

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.backbone.decoder_layers import decoder_layers
from gatera_lightning.checkpointing.atomic_files import make_empty_folder, remove, replace, temporary_path
from gatera_lightning.checkpointing.checkpoint_io import AtomicCheckpointIO
from gatera_lightning.checkpointing.sharded_format import map_tensors, write_sharded
from gatera_lightning.compatibility.lightning_internals import set_data_parallel_size, set_module_device
from gatera_lightning.distributed.gather import run_on_every_rank
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)


def shard_layers(model: nn.Module, mesh: DeviceMesh, offload: OffloadPolicy | None = None) -> None:
    """Shard every decoder layer as one group and the rest of the model as another, in place.

    Inside a decoder layer's forward pass ``W0`` is then a full tensor, which HiRA's product with it needs.
    Sharding each linear layer on its own would leave it sharded there.

    Args:
        model: An adapted model.
        mesh: Of one dimension to shard over all its ranks (FSDP), or of two to shard over the second
            dimension and replicate over the first (HSDP).
        offload: Whether shards stay on the CPU.

    Raises:
        ValueError: The decoder layers cannot be found.
        ConfigError: Several decoder layers share a weight, which belongs to one group only.
    """
    offload = offload or OffloadPolicy()
    layers = decoder_layers(model)
    seen: dict[nn.Parameter, str] = {}
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            path = f"{index}.{name}"
            if (other := seen.setdefault(parameter, path)) != path:
                raise ConfigError(
                    f"trainer.strategy: AdapterShardingStrategy, but decoder layers {other} and {path} share "
                    "a weight, which only one group of shards can hold; accepted: auto, ddp"
                )
    for layer in layers:
        fully_shard(layer, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)


class AdapterShardingStrategy(ModelParallelStrategy):
    """FSDP2 or HSDP over all ranks, with checkpoints that hold the adapter and its optimizer only.

    Checkpoints do not depend on the parallelism strategy: tensors have their full names and shapes, so a run
    saved with this strategy can resume on one process, with DDP, or on another number of ranks. The backbone
    is never gathered.
    """

    def __init__(
        self,
        shard_size: int | Literal["auto"] = "auto",
        replicate_size: int = 1,
        cpu_offload: bool = False,
        sharded_checkpoints: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """Shard over ``shard_size`` ranks and keep ``replicate_size`` copies of the model.

        Args:
            shard_size: Ranks over which one copy of the model is sharded; auto divides all ranks by
                replicate_size.
            replicate_size: Copies of the model (HSDP). Shard within a node and replicate over nodes, so that
                all-gathers stay within a node. The product of the two sizes is the number of ranks.
            cpu_offload: Keep shards on the CPU and copy each layer to the accelerator when it runs.
            sharded_checkpoints: Let every rank write its own file, all at the same time, instead of one file
                in total. An adapter is usually small enough for one file.
            process_group_backend: Name in torch.distributed; the default fits the device.
            timeout: How long a rank waits for the others.
        """
        if cpu_offload and process_group_backend is None and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"  # gradients are clipped on the CPU
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.shard_size = shard_size
        self.replicate_size = replicate_size
        self.cpu_offload = cpu_offload
        self.sharded_checkpoints = sharded_checkpoints
        self.mesh: DeviceMesh | None = None

    def problems(self, ranks: int) -> list[str]:
        """Return every problem with the sizes for this number of ranks.

        Args:
            ranks: Nodes × devices.

        Returns:
            Messages that name the setting, its value and what is accepted; empty if there is no problem.
        """
        sizes = {"shard_size": self.shard_size, "replicate_size": self.replicate_size}
        found = [
            f"trainer.strategy.{name}: {size}; accepted: an integer of at least 1"
            for name, size in sizes.items()
            if size != "auto" and size < 1
        ]
        if found:
            return found
        if self.shard_size == "auto":
            if ranks % self.replicate_size:
                return [
                    f"trainer.strategy.replicate_size: {self.replicate_size} does not divide the {ranks} "
                    "ranks (nodes × devices); accepted: a divisor of that number"
                ]
        elif self.shard_size * self.replicate_size != ranks:
            return [
                f"trainer.strategy: replicate_size {self.replicate_size} × shard_size {self.shard_size} is "
                f"{self.replicate_size * self.shard_size}, but there are {ranks} ranks (nodes × devices); "
                "accepted: sizes with that product, or shard_size auto"
            ]
        return []

    @override
    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if problems := self.problems(ranks):
            raise ConfigError(problems, on_every_rank=True)
        set_data_parallel_size(self, ranks)  # every rank has its own examples, also within a shard group
        super().setup_environment()
        if self.replicate_size == 1:
            self.mesh = self.device_mesh["data_parallel"]
        else:
            shape, names = (self.replicate_size, ranks // self.replicate_size), ("replicate", "shard")
            self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def shard(self, model: nn.Module) -> None:
        """Shard a model over this strategy's ranks, in place."""
        assert self.mesh is not None  # Lightning sets the environment up before it builds the model
        pinned = self.root_device.type != "cpu"  # pinning memory needs an accelerator
        shard_layers(model, self.mesh, CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else None)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        module = self.lightning_module
        assert module is not None
        for name, child in module.named_children():
            if name != "model":  # metrics go where the model computes; its weights are copied layer by layer
                child.to(self.root_device)
        set_module_device(module, self.root_device)

    # --- checkpoints: the adapter only ---

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state: dict[str, Any] = self._for_checkpoint(self.lightning_module.state_dict())
        return state

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = self._for_checkpoint(own.state_dict())
        return state

    def _for_checkpoint(self, state: Any) -> Any:
        """Return full CPU tensors on rank 0 and nothing elsewhere, unless checkpoints are sharded."""
        if self.sharded_checkpoints:
            return state
        unsharded = map_tensors(
            state, lambda _, tensor: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        )
        return unsharded if self.is_global_zero else {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if self.sharded_checkpoints:
            self._save_sharded(checkpoint, path)
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def _save_sharded(self, checkpoint: dict[str, Any], path: Path) -> None:
        temporary, is_first = temporary_path(path), self.is_global_zero
        steps = (
            lambda: make_empty_folder(temporary) if is_first else None,
            lambda: write_sharded(checkpoint, temporary, rank=self.global_rank),
            lambda: replace(temporary, path) if is_first else None,
        )
        failure = None
        for step in steps:
            failure = failure or run_on_every_rank(step, catch=(OSError, RuntimeError, CheckpointException))
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)  # set by GateRAModule.setup
        self.checkpoint_io.failure = (
            failure
            and f"cannot write the checkpoint {path} ({failure}); the previous checkpoint is unchanged"
        )
        if failure and is_first:
            log.error(self.checkpoint_io.failure)
            remove(temporary)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        with torch.no_grad():
            for name, parameter in adapter_parameters(self.lightning_module).items():
                parameter.copy_(_shard_like(checkpoint["state_dict"][name], parameter))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            sharded = {
                index: {name: _shard_like(value, parameters[index]) for name, value in moments.items()}
                for index, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": sharded})


def _shard_like(value: Any, parameter: nn.Parameter) -> Any:
    """Shard a full tensor of the parameter's shape like the parameter; return anything else unchanged."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and isinstance(parameter, DTensor):
        full = value.to(device=parameter.device, dtype=parameter.dtype)
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
