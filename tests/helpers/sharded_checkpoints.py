"""A sharded checkpoint written by one process."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gatera_lightning.checkpointing.checkpoint_io import write_sharded


def write_in_shards(checkpoint, path):
    """A sharded checkpoint, of one process."""
    path.mkdir()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards = {
            name: distribute_tensor(tensor, mesh, [Shard(0)])
            for name, tensor in checkpoint["state_dict"].items()
        }
        write_sharded(checkpoint | {"state_dict": shards}, path, rank=0)
    finally:
        torch.distributed.destroy_process_group()
    return path
