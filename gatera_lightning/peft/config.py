"""PEFT's configuration of a gated adapter."""

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.gates import GATES, GateConfig, gate_from_dict
from gatera_lightning.adapters.peft_schema import RECORD, settings_digest, to_text
from gatera_lightning.adapters.serialization import WEIGHTS_FILE
from gatera_lightning.adapters.stored_config import CONFIG_FILE, FORMAT_VERSION
from gatera_lightning.adapters.target_problems import ALL_LINEAR
from gatera_lightning.checkpointing.atomic_files import atomic_file
from gatera_lightning.errors import ConfigError, unknown_value


class GateRAType(enum.StrEnum):
    """The method's name, in the form in which PEFT and Transformers read names of methods."""

    GATERA = "GATERA"


@dataclass
class GateRAConfig(PeftConfig):
    """Settings of a gated adapter for PEFT; a layer computes ``y = W0 x + b + g(x) · u(x)``.

    The settings of the method are those of :class:`~gatera_lightning.AdapterConfig`; those that choose
    modules are PEFT's, with PEFT's meaning.

    Raises:
        ConfigError: If a value cannot work with any model. The error names all problems.
    """

    update: str = "hira"
    """The update u(x): ``lora``, ``dora``, ``hira``, ``abba`` or ``block_hira``."""

    gate: str | dict[str, Any] | GateConfig = "token"
    """The gate g(x): the name of a kind, its settings as a dictionary with ``kind``, or a GateConfig. Stored
    as a dictionary."""

    r: int = 32
    """Rank r of B A."""

    alpha: float | None = None
    """Scales the update by alpha/r; None means alpha = r. An error with ``hira``, which has no scale."""

    blocks: int | None = None
    """With ``block_hira``, the number of blocks along each side of a weight; None means 2."""

    stochastic_rounding: bool = False
    """With ``hira`` in bfloat16: let training multiply by ``W0 + W0 ⊙ BA``, rounded at random so that it is
    right on average, which saves matmuls; False is exact."""

    dropout: float = 0.0
    """Dropout probability on the update's input."""

    target_modules: list[str] | set[str] | str | None = None
    """Names of modules to adapt, a regular expression for whole names, or ``all-linear``. None adapts
    ``q_proj k_proj v_proj up_proj down_proj`` where a model has them, else what PEFT adapts with HiRA."""

    exclude_modules: list[str] | set[str] | str | None = None
    """Names of modules to leave out, or a regular expression for whole names."""

    modules_to_save: list[str] | None = None
    """Modules that are trained as a whole and saved with the adapter."""

    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Tokens whose rows of the embedding are trained and saved with the adapter."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the decoder layers to adapt; None adapts all of them."""

    layers_pattern: list[str] | str | None = None
    """Name of the module list that the indices of ``layers_to_transform`` belong to."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from ``r``, by name or regular expression of a module."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Values that differ from ``alpha``, by name or regular expression of a module."""

    adapter_dtype: str = "float32"
    """Dtype of the adapter's parameters."""

    gatera: dict[str, Any] = field(default_factory=dict)
    """What a folder says about its backbone, its prompt template and its files; not a setting."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GateRAType.GATERA
        if isinstance(self.gate, str) and self.gate in GATES:
            self.gate = GATES[self.gate]()
        if isinstance(self.gate, Mapping):
            self.gate = gate_from_dict(self.gate)
        self._backbone: dict[str, Any] = {}
        self._check()
        self.gate = self.gate_config.to_dict()

    def _check(self) -> None:
        if not isinstance(self.gate, GateConfig):
            raise ConfigError(unknown_value("GateRAConfig.gate", self.gate, GATES))
        problems = self._adapter_config(self.r, self.alpha).problems()
        if self.gate.mask_embeddings:
            problems.append(
                f"gate.mask_embeddings: {self.gate.mask_embeddings}, which PEFT does not train or load; "
                "accepted: 0, or gatera_lightning.load_adapter"
            )
        for pattern, rank in (self.rank_pattern or {}).items():
            problems += [f"{pattern}: {text}" for text in self._adapter_config(rank, None).problems()]
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    problems.append(
                        f"{name}: {getattr(self, name)!r} with a target_modules that is a regular expression "
                        f"({self.target_modules!r}); accepted: a list of names in target_modules"
                    )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            problems.append(f"layers_pattern: {self.layers_pattern!r} without layers_to_transform")
        if problems:
            raise ConfigError(
                [text.replace("adapter.rank", "r").replace("adapter.", "") for text in problems]
            )

    @property
    def gate_config(self) -> GateConfig:
        """The settings of the gate."""
        return gate_from_dict(self.gate) if isinstance(self.gate, Mapping) else self.gate  # type: ignore[return-value]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, with the digests of the settings and of the weights beside it."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / CONFIG_FILE
        description = json.loads(path.read_text(encoding="utf-8"))
        for key in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, key), set):
                description[key] = sorted(description[key])
        weights = path.with_name(WEIGHTS_FILE)
        record = self._backbone | self.gatera | {"format_version": FORMAT_VERSION}
        record["settings_sha256"] = settings_digest(description)
        if weights.is_file():
            record["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        with atomic_file(path) as temporary:
            temporary.write_text(to_text(description | {RECORD: record}), encoding="utf-8")

    def set_backbone(self, description: dict[str, Any]) -> None:
        """Remember the backbone that an adapter with these settings was injected into, for its folder."""
        self._backbone = description

    def for_module(self, name: str) -> AdapterConfig:
        """Return the settings of the module ``name``, with its own rank and alpha."""
        rank, alpha = (
            (patterns or {}).get(get_pattern_key(list(patterns or {}), name), default)
            for patterns, default in ((self.rank_pattern, self.r), (self.alpha_pattern, self.alpha))
        )
        return self._adapter_config(rank, alpha)

    def _adapter_config(self, rank: Any, alpha: Any) -> AdapterConfig:
        targets = self.target_modules
        names = sorted(targets) if isinstance(targets, set) else targets
        config = AdapterConfig(
            update=self.update,
            gate=self.gate_config,
            rank=rank,
            alpha=alpha,
            blocks=self.blocks,
            stochastic_rounding=self.stochastic_rounding,
            dropout=self.dropout,
            adapter_dtype=self.adapter_dtype,  # type: ignore[arg-type]
        )
        if names is not None:
            if isinstance(names, str) and names.lower() == ALL_LINEAR:  # PEFT ignores the case
                config.target_modules = ALL_LINEAR
            else:
                config.target_modules = [names] if isinstance(names, str) else list(names)
        if isinstance(self.layers_to_transform, list):
            config.layers = self.layers_to_transform
        return config
