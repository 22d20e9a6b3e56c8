"""Sharding a frozen backbone with trainable adapters: PyTorch FSDP2 (``fully_shard``) under Lightning's Trainer."""

import logging
import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from typing_extensions import override

from gatera_lightning.adapters.injection import adapted_linears, adapter_parameters
from gatera_lightning.checkpointing.checkpoint_io import (
    DRAFT,
    WholeCheckpointIO,
    mapped,
    new_folder,
    replace_folder,
    write_sharded,
)
from gatera_lightning.errors import ConfigError

log = logging.getLogger(__name__)


def shard_layers(model: nn.Module, mesh: DeviceMesh, offload: OffloadPolicy | None = None) -> None:
    """Shard every decoder layer as one group, then the rest of the model as another, in place.

    ``W0`` is whole inside its layer's forward, which is what HiRA's product with it needs; sharding single linears
    would leave it in pieces there. A mesh of one dimension shards over all its processes (FSDP), one of two shards over the
    second and replicates over the first (HSDP). Raises ValueError when the decoder layers cannot be told.
    """
    offload = offload or OffloadPolicy()
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList that holds adapted linears."""
    inside = set(adapted_linears(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(path.startswith(f"{name}.") for path in inside):
            return module
    raise ValueError("cannot tell the decoder layers: no adapted linear lies in an nn.ModuleList")


class AdapterShardingStrategy(ModelParallelStrategy):
    """FSDP2, or HSDP, over all processes; checkpoints hold the adapter and its optimizer, the backbone is never gathered.

    A checkpoint of this strategy is that of any other: names and shapes are whole, whatever the number of processes was, so a
    run goes on with other devices, sharded or not.
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
        """Shard over ``shard_size`` processes, and hold ``replicate_size`` copies.

        Args:
            shard_size: Processes over which one copy of the model is sharded; auto means all that replicate_size leaves.
            replicate_size: Copies of the model (HSDP): shard within a node, replicate over nodes, and parameters travel fast
                links only. The product of the two is the number of processes.
            cpu_offload: Keep shards on the CPU and copy a layer to the accelerator for its turn.
            sharded_checkpoints: One file a process, written at once, instead of one file. An adapter usually fits one.
            process_group_backend: As torch.distributed names it; default: what suits the device.
            timeout: How long a process waits for the others.
        """
        if cpu_offload and process_group_backend is None and torch.cuda.is_available():
            process_group_backend = "cpu:gloo,cuda:nccl"  # gradients are clipped where they are kept
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=sharded_checkpoints,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.shard_size = shard_size
        self.replicate_size = replicate_size
        self.cpu_offload = cpu_offload
        self.mesh: DeviceMesh | None = None

    def problems(self, processes: int) -> list[str]:
        """Everything about these sizes that cannot work with so many processes; empty when all is well."""
        sizes = {"shard_size": self.shard_size, "replicate_size": self.replicate_size}
        found = [
            f"trainer.strategy.{name}: {size}; accepted: an integer of at least 1"
            for name, size in sizes.items()
            if size != "auto" and size < 1
        ]
        if found:
            return found
        if self.shard_size == "auto" and processes % self.replicate_size:
            found.append(
                f"trainer.strategy.replicate_size: {self.replicate_size} does not divide the {processes} processes "
                "(nodes × devices); accepted: a divisor of that"
            )
        elif self.shard_size != "auto" and self.shard_size * self.replicate_size != processes:
            found.append(
                f"trainer.strategy: replicate_size {self.replicate_size} × shard_size {self.shard_size} is "
                f"{self.replicate_size * self.shard_size}, and there are {processes} processes (nodes × devices); "
                "accepted: sizes whose product that is, or shard_size auto"
            )
        return found

    @override
    def setup_environment(self) -> None:
        processes = self.num_nodes * self.num_processes
        if problems := self.problems(processes):
            raise ConfigError(problems, on_every_process=True)
        self._data_parallel_size = processes  # to Lightning, every process has other rows
        super().setup_environment()
        shard = processes // self.replicate_size
        if self.replicate_size == 1:
            self.mesh = self.device_mesh["data_parallel"]
        else:
            shape, names = (self.replicate_size, shard), ("replicate", "shard")
            self.mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def shard(self, model: nn.Module) -> None:
        """Shard a model over this strategy's processes, in place."""
        assert self.mesh is not None  # set_up, before any model is built
        pinned = (
            self.root_device.type != "cpu"
        )  # without an accelerator nothing can be, and nothing is copied
        shard_layers(model, self.mesh, CPUOffloadPolicy(pin_memory=pinned) if self.cpu_offload else None)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()
            return
        module = self.lightning_module
        assert module is not None
        for (
            name,
            own,
        ) in module.named_children():  # metrics meet what the model computes; its weights come by themselves
            if name != "model":
                own.to(self.root_device)
        module._device = self.root_device  # what Lightning says of it, which .to would have told

    # --- checkpoints: the adapter alone ---

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._portable(self.lightning_module.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._portable(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def _portable(self, state: Any) -> Any:
        """Nested state without shards: whole CPU tensors on rank 0, nothing elsewhere; as it is for a sharded checkpoint."""
        if self._save_distributed_checkpoint:
            return state
        whole = mapped(
            state, lambda _, tensor: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        )
        return whole if self.is_global_zero else {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        draft, first = path.with_name(path.name + DRAFT), self.is_global_zero
        failure = self._failure(lambda: new_folder(draft) if first else None)
        failure = failure or self._failure(lambda: write_sharded(checkpoint, draft, rank=self.global_rank))
        failure = failure or self._failure(lambda: replace_folder(draft, path) if first else None)
        assert isinstance(self.checkpoint_io, WholeCheckpointIO)  # GateRAModule.setup
        self.checkpoint_io.failure = (
            failure and f"cannot write the checkpoint {path} ({failure}); what was there is untouched"
        )
        if failure and first:
            log.error(self.checkpoint_io.failure)
            shutil.rmtree(draft, ignore_errors=True)

    def _failure(self, work: Callable[[], None]) -> str | None:
        """Do this process's part; what kept any of them from it, as all are told. A disk may be full for one alone."""
        failure = None
        try:
            work()
        except (OSError, RuntimeError, CheckpointException) as error:
            failure = " ".join(str(error).split())
        everyone: list[str | None] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, failure)
        return next(filter(None, everyone), None)

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = adapter_parameters(self.lightning_module)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(_like(checkpoint["state_dict"][name], parameter))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            placed = {
                number: {name: _like(value, parameters[number]) for name, value in of_one.items()}
                for number, of_one in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": placed})


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """A whole tensor of a parameter's shape as that parameter lies: sharded if it is. Anything else as it is."""
    if isinstance(value, Tensor) and value.shape == parameter.shape and isinstance(parameter, DTensor):
        own = value.to(device=parameter.device, dtype=parameter.dtype)
        return distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
