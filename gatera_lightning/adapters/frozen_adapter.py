"""A trained adapter that is part of a frozen model, over which another adapter is trained.

Its layers compute ``W0 x + b + g(x) · u(x)`` as in decoding. What trains, saves, counts or records adapters
does not see them, and an adapter that is injected afterwards adapts them like linear layers, with the
fingerprint of ``W0``.
"""

import hashlib
import json
from pathlib import Path

from torch import nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.identity import adapter_identity
from gatera_lightning.adapters.injection import inject
from gatera_lightning.adapters.loading import load_adapter
from gatera_lightning.adapters.lookup import adapted_linears


def load_frozen_adapter(model: nn.Module, folder: str | Path) -> None:
    """Make the adapter in a folder a part of a model, in place.

    Args:
        model: The backbone that the adapter was trained on.
        folder: An adapter folder.

    Raises:
        AdapterFileError: As in :func:`~gatera_lightning.load_adapter`.
        ConfigError: As in :func:`~gatera_lightning.load_adapter`.
    """
    _freeze(model, adapter_digest(model, load_adapter(model, folder)))


def inject_frozen_adapter(model: nn.Module, config: AdapterConfig, digest: str) -> None:
    """Make an adapter a part of a model whose weights follow, or that has none.

    Args:
        model: The backbone.
        config: The adapter's settings.
        digest: What :func:`adapter_digest` returns for its values.
    """
    inject(model, config, stored=True)
    _freeze(model, digest)


def adapter_digest(model: nn.Module, config: AdapterConfig) -> str:
    """Return the SHA-256 over the settings and the values of a model's adapter; a collective if sharded."""
    settings = json.dumps(config.to_dict(), sort_keys=True)
    return hashlib.sha256(f"{settings}\n{adapter_identity(model)}".encode()).hexdigest()


def _freeze(model: nn.Module, digest: str) -> None:
    for layer in adapted_linears(model).values():
        layer.freeze(digest)
