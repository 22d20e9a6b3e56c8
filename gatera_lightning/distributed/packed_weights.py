"""Packed frozen weights under DDP: every rank packs its own copy, and nothing of it is broadcast."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatera_lightning.adapters.packed_weight import PackedWeight


def exclude_packed_weights(module: nn.Module) -> None:
    """Let DDP leave packed weights alone: packing is deterministic, and they cannot be written to.

    Args:
        module: What will be wrapped in DDP.
    """
    names = [name for name, p in module.named_parameters() if isinstance(p, PackedWeight)]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
