"""The contract of a storage: how a frozen weight is packed into fewer bits, and unpacked."""

import importlib.util
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gatera_lightning.errors import ConfigError


class Packed(NamedTuple):
    """A packed weight without its shape."""

    parts: dict[str, Tensor]
    """What is stored: codes, scales."""

    layout: Any = None
    """What :meth:`Storage.unpack` needs to know besides; plain values."""


class Storage(ABC):
    """A way to store a weight; a subclass packs a weight once, and unpacks it in every pass."""

    name: ClassVar[str]
    """Name in configs."""

    package: ClassVar[str | None] = None
    """The Python package that it needs, as it is imported; None if it needs none."""

    extra: ClassVar[str] = "quantized"
    """The extra of this project that installs the package."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Packed:
        """Pack a weight (out, in), which may be on the meta device."""

    @abstractmethod
    def unpack(self, packed: Packed, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a new dense tensor (out, in): every element rounded once, from float32 to ``dtype``."""

    def read_layer(self, linear: nn.Linear) -> Packed | None:
        """Return the packed weight of a layer that the package itself quantized; None for other layers."""
        return None

    def problem(self) -> str | None:
        """Say which package is missing, if one is; does not import it."""
        if self.package is None or _is_installed(self.package):
            return None
        return (
            f"{self.name!r} needs the package {self.package}, which is missing: {self._installation}; "
            "accepted without it: none, int8"
        )

    @property
    def _installation(self) -> str:
        return f"pip install 'gatera-lightning[{self.extra}]'"

    def check_backend(self, device_type: str = "cpu") -> None:
        """Pack and unpack a few numbers.

        Args:
            device_type: Where weights will be packed.

        Raises:
            ConfigError: If the package is missing, or cannot do that on this device.
        """
        if problem := self.problem():
            raise ConfigError(f"backbone.quantization: {problem}")
        try:
            weight = torch.linspace(-1, 1, 4096, device=device_type).view(32, 128)
            found = self.unpack(self.pack(weight), weight.shape, torch.float32)
        except Exception as error:  # a broken installation may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ConfigError(
                f"backbone.quantization: {self.name!r} does not work on {device_type} of this machine "
                f"({reason}); accepted: none, int8, or a working installation: {self._installation}"
            ) from error
        error_size = float((found - weight).abs().max())
        if not error_size < 0.2:
            raise ConfigError(
                f"backbone.quantization: {self.name!r} gives wrong numbers on {device_type} of this machine "
                f"(off by {error_size:.2g} in a weight from -1 to 1); accepted: none, int8"
            )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
