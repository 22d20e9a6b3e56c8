"""PEFT's layer over an adapted layer: several adapters on one frozen layer, of which some are active."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import weight_fingerprint
from gatera_lightning.adapters.gates import Gate
from gatera_lightning.adapters.layer import AdaptedLinear, add_to_selected, build_parts
from gatera_lightning.adapters.linear_layers import has_plain_forward, is_modified
from gatera_lightning.adapters.packed_weight import PackedWeight
from gatera_lightning.adapters.updates.base import Update, add_gated


class GateRALinear(AdaptedLinear, BaseTunerLayer):  # type: ignore[misc]  # PEFT annotates bias as never None
    """An :class:`~gatera_lightning.adapters.layer.AdaptedLinear` whose adapter PEFT can switch.

    With one active adapter, the forward pass is that of AdaptedLinear. With several, their updates add up.

    Args:
        base_layer: The frozen layer.
        adapter_name: Name of the first adapter.
        config: Its settings.
    """

    adapter_layer_names = ("gatera_update", "gatera_gate")
    other_param_names = ("gatera_dropout", "gatera_config")

    def __init__(self, base_layer: nn.Linear, adapter_name: str, config: AdapterConfig) -> None:
        nn.Module.__init__(self)  # AdaptedLinear's own constructor would create one adapter without a name
        self.base_layer = base_layer
        self.gatera_update = nn.ModuleDict()
        self.gatera_gate = nn.ModuleDict()
        self.gatera_dropout = nn.ModuleDict()
        self.gatera_config: dict[str, AdapterConfig] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = adapter_name
        self._has_own_memory: set[str] = set()  # adapters that were copied out of a mapped file
        self._before_merge: list[nn.Parameter] = []  # a list, because an attribute would be a parameter
        self._base_fingerprint = weight_fingerprint(base_layer.weight)
        self._gate_listener = None
        self._inference_path = None
        self.add_adapter(adapter_name, config)

    def add_adapter(self, adapter_name: str, config: AdapterConfig) -> None:
        """Add an adapter, which starts from the frozen layer's output."""
        parts = build_parts(self.base_layer, config)
        self._has_own_memory.discard(adapter_name)
        self.gatera_config[adapter_name] = config
        self.gatera_update[adapter_name] = parts.update
        self.gatera_dropout[adapter_name] = parts.dropout
        if parts.gate is not None:
            self.gatera_gate[adapter_name] = parts.gate
        for added in (parts.update, parts.dropout, parts.gate):
            if added is not None:
                added.train(self.base_layer.training)
        self.set_adapter(self.active_adapters)

    def train(self, mode: bool = True) -> "GateRALinear":
        """Set training or evaluation mode, as Transformers does once it has loaded an adapter."""
        for name in set(self.gatera_config) - self._has_own_memory:
            loaded = [p for p in self._parameters_of(name) if getattr(p, "_is_hf_initialized", False)]
            if loaded:
                _copy_to_own_memory(loaded)
                self._has_own_memory.add(name)
        return super().train(mode)

    def _parameters_of(self, name: str) -> Iterator[nn.Parameter]:
        for parts in (self.gatera_update, self.gatera_gate):
            if name in parts:
                yield from parts[name].parameters()

    @property
    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.gatera_config]

    @property
    def is_active(self) -> bool:
        """Whether the layer's output is more than that of the frozen layer."""
        return bool(self._active) and not self.disable_adapters and not self.merged

    @property
    def base(self) -> nn.Linear:  # type: ignore[override]
        """The frozen layer."""
        return self.base_layer

    @property
    def config(self) -> AdapterConfig:  # type: ignore[override]
        """The settings of the first active adapter."""
        return self.gatera_config[self._active[0]]

    @property
    def update(self) -> Update:  # type: ignore[override]
        """The update of the first active adapter."""
        return cast(Update, self.gatera_update[self._active[0]])

    @property
    def gate(self) -> Gate | None:  # type: ignore[override]
        """The gate of the first active adapter; None for ``g = 1``."""
        return self._gate(self._active[0])

    def _gate(self, name: str) -> Gate | None:
        return cast(Gate, self.gatera_gate[name]) if name in self.gatera_gate else None

    @property
    def dropout(self) -> nn.Module:  # type: ignore[override]
        """Dropout on the update's input of the first active adapter."""
        return self.gatera_dropout[self._active[0]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer's output with the active adapters: (..., in) -> (..., out)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.is_active:
            return self.base_layer(x, *args, **kwargs)
        active = self._active
        return super().forward(x) if len(active) == 1 else self._forward_sum(x, active)

    def _forward_sum(self, x: Tensor, names: list[str]) -> Tensor:
        """Compute ``W0 x + b + Σ g_i(x) · u_i(x)`` over several adapters."""
        y: Tensor = self.base_layer(x)
        for name in names:
            update = cast(Update, self.gatera_update[name])
            gate, dropout = self._gate(name), self.gatera_dropout[name]
            if gate is not None and gate.selects_tokens:
                selected = gate.selected_tokens(x)
                if self._gate_listener is not None:
                    self._gate_listener(gate(x))
                y = add_to_selected(y, x, selected, update, self.base_layer, dropout)
                continue
            delta = update.delta_with_dropout(x, self.base_layer, dropout)
            if gate is None:
                y = add_gated(y, delta, None)
                continue
            logit = gate(x, F.linear(x, self.base_layer.weight), delta) if gate.needs_update else gate(x)
            if self._gate_listener is not None:
                self._gate_listener(logit)
            y = add_gated(y, delta, gate.values(logit))
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the frozen weight: ``W = W0 + Σ g_i · ΔW_i``, rounded once to its dtype.

        Args:
            safe_merge: Raise if the merged weight has NaN or infinite values; it is checked in any case.
            adapter_names: The adapters; None merges the active ones.

        Raises:
            ValueError: If a gate depends on the token, the frozen layer computes more than ``W0 x + b``, or
                the merged weight is not finite; the layer is then unchanged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.gatera_config]
        if not names:
            return
        for name in names:
            self._check_merge(name)
        weight = self.base_layer.weight
        frozen = self._before_merge[0] if self._before_merge else weight
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in names:
            update = cast(Update, self.gatera_update[name])
            delta = update.delta_weight(frozen)
            gate = self._gate(name)
            if gate is not None:
                delta = delta * gate.constant_value()
            total = total.to(torch.promote_types(total.dtype, delta.dtype)) + delta
        merged = total.to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"merging {', '.join(names)} gives NaN or infinite weights in {weight.dtype}")
        if not self._before_merge:
            self._before_merge.append(cast(nn.Parameter, weight))
        # Not in place: another layer, the embeddings or another model may share this weight.
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)
        self.merged_adapters.extend(names)

    def _check_merge(self, name: str) -> None:
        config = self.gatera_config[name]
        gate = self._gate(name)
        if gate is not None and gate.depends_on_token:
            raise ValueError(
                f"the adapter {name!r} has a {config.gate.kind!r} gate, whose value differs between tokens, "
                "so no single matrix equals it. Only gates that do not depend on the token merge ('none', "
                "'static'); keep the adapter, or call unload() for the backbone without it."
            )
        if isinstance(self.base_layer.weight, PackedWeight):
            raise ValueError(
                f"a weight that is stored as {self.base_layer.weight.storage_name} would round the merged "
                "one; accepted: dense weights, as after "
                "gatera_lightning.backbone.quantization.dequantize_linear_layers(model)"
            )
        if is_modified(self.base_layer) or not has_plain_forward(self.base_layer):
            raise ValueError(
                "a layer with hooks or a forward of its own cannot be merged, because its output is not a "
                "matrix times its input"
            )

    def unmerge(self) -> None:
        """Put back the frozen weight, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        frozen, merged = self._before_merge.pop(), self.base_layer.weight
        frozen.data = frozen.data.to(device=merged.device, dtype=merged.dtype)
        self.base_layer.weight = frozen
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: a gated or a Hadamard update is no low-rank one."""
        return False

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the frozen layer's device; unlike in PEFT's own layers, it keeps its dtype."""
        for parts in (self.gatera_update, self.gatera_gate, self.gatera_dropout):
            if adapter_name in parts and not any(p.is_meta for p in parts[adapter_name].parameters()):
                parts[adapter_name].to(device or self.base_layer.weight.device)
                _copy_to_own_memory(parts[adapter_name].parameters())

    def extra_repr(self) -> str:
        """Return the methods by adapter, for ``print(model)``."""
        return ", ".join(
            f"{name}: update={config.update}, gate={config.gate.kind}, rank={config.rank}"
            for name, config in self.gatera_config.items()
        )


def _copy_to_own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Copy parameters that PEFT or Transformers has just loaded out of the mapped file.

    In the file, tensors begin at any multiple of 8 bytes, and in memory of PyTorch at a multiple of 64. The
    CPU's matmuls add up in another order if a matrix is not aligned: ``A Aᵀ`` in DoRA's row norms, and
    ``A x`` of a single token. Whoever writes the file would change the parameters, too.
    """
    for parameter in parameters:
        if type(parameter) is nn.Parameter:  # a sharded one has memory of its own
            parameter.data = parameter.data.clone()
