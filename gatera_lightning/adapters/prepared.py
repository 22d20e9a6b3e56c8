"""What an update makes of its factors alone, kept while nothing is trained: a token of decoding then needs no ``B A``."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.tensor import DTensor

from gatera_lightning.adapters.inject import adapted_linears
from gatera_lightning.adapters.lora import LoRA


@contextmanager
def prepared_for_inference(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, forwards reuse HiRA's ``W0 ⊙ BA`` and DoRA's row norms: the same numbers, bit for bit.

    Costs the memory of HiRA's adapted weights once more. Layers whose weights are sharded are left as they are, since what is
    kept of them would not be. Factors must not change inside; a forward with gradients raises RuntimeError.
    """
    kept = []
    for layer in adapted_linears(model).values():
        update = layer.update
        if not isinstance(update, LoRA) and update.kept is None and not isinstance(layer.base.weight, DTensor):
            update.kept = update.constant(layer.base.weight)
            kept.append(update)
    try:
        yield
    finally:
        for update in kept:
            update.kept = None
