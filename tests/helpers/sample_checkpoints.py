"""Small checkpoints, as single files and as sharded folders, and ways to corrupt them."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gatera_lightning.checkpointing.sharded_format import write_sharded

TENSORS = {"model.a": torch.arange(1024.0).reshape(32, 32).sin(), "model.b": torch.arange(64.0).cos()}
CHECKPOINT = {"state_dict": TENSORS, "global_step": 7, "loops": {"seen": [3, 4]}, "name": "a checkpoint"}


def is_checkpoint(found):
    """Whether a loaded checkpoint equals ``CHECKPOINT``."""
    same_tensors = all(torch.equal(found["state_dict"][name], tensor) for name, tensor in TENSORS.items())
    return same_tensors and {**found, "state_dict": None} == {**CHECKPOINT, "state_dict": None}


def save_step(path, step):
    """Save a checkpoint file of an optimizer step."""
    torch.save({"global_step": step, "state_dict": TENSORS}, path)
    return path


def write_sharded_checkpoint(checkpoint, path):
    """Write a sharded checkpoint with one rank."""
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


def with_flipped_bit(content, position, bit):
    """Return bytes in which one bit is flipped."""
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def tensor_positions(path):
    """Return the positions of every byte of a tensor in a checkpoint file."""
    content = path.read_bytes()
    return {
        position
        for tensor in TENSORS.values()
        for start in [content.index(tensor.numpy().tobytes())]
        for position in range(start, start + tensor.nbytes)
    }


def flip_bit_of_tensor(path, bit=5):
    """Flip a bit of a tensor in a checkpoint file."""
    path.write_bytes(with_flipped_bit(path.read_bytes(), min(tensor_positions(path)), bit))


def truncate(path):
    """Remove the last hundred bytes of a file."""
    path.write_bytes(path.read_bytes()[:-100])


def make_empty(path):
    """Remove the content of a file."""
    path.write_bytes(b"")
