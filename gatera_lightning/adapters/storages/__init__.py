"""The ways to store a frozen weight in fewer bits, by name; see :class:`Storage`."""

from gatera_lightning.adapters.storages.base import Storage
from gatera_lightning.adapters.storages.four_bit import NF4, NF4Double
from gatera_lightning.adapters.storages.int8 import Int8
from gatera_lightning.adapters.storages.library_tensors import QuantoInt4, QuantoInt8, TorchaoInt8

__all__ = ["STORAGES", "Storage"]

STORAGES: dict[str, Storage] = {
    storage.name: storage
    for storage in (NF4(), NF4Double(), Int8(), TorchaoInt8(), QuantoInt8(), QuantoInt4())
}
"""The available storages, by name."""
