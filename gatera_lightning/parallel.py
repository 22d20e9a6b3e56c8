"""Sharding a frozen backbone with trainable adapters: PyTorch FSDP2 (``fully_shard``) under Lightning's Trainer."""

from typing import Any, Literal

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from typing_extensions import override

from gatera_lightning.adapters.inject import adapted_linears


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every decoder layer as one group, then the rest of the model as another, in place.

    ``W0`` is whole inside its layer's forward, which is what HiRA's product with it needs; sharding single linears
    would leave it in pieces there. Raises ValueError when the decoder layers cannot be told.
    """
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the outermost ModuleList that holds adapted linears."""
    inside = set(adapted_linears(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(path.startswith(f"{name}.") for path in inside):
            return module
    raise ValueError("cannot tell the decoder layers: no adapted linear lies in an nn.ModuleList")


class AdapterShardingStrategy(ModelParallelStrategy):
    """FSDP2 over all processes.

    Checkpoints hold the adapter only, because GateRAModule's ``state_dict`` does; the backbone is never gathered.
    """

    def __init__(
        self,
        data_parallel_size: int | Literal["auto"] = "auto",
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        """Shard over ``data_parallel_size`` processes.

        Args:
            data_parallel_size: Processes to shard over; auto means all of them (to Lightning it means the nodes).
            save_distributed_checkpoint: One file per rank instead of one file. An adapter fits one.
            kwargs: As ModelParallelStrategy takes them.
        """
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )

    @override
    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
