"""PEFT's tuner of the method: which modules of a model get a gated layer."""

from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.fingerprint import WeightFingerprint, backbone_fingerprint, weight_fingerprint
from gatera_lightning.adapters.identity import (
    backbone_problem,
    quantization_while_loading,
    warn_of_other_quantization,
)
from gatera_lightning.adapters.linear_layers import weight_problem
from gatera_lightning.adapters.targets import positive_indices
from gatera_lightning.adapters.updates import UPDATES
from gatera_lightning.errors import AdapterFileError, ConfigError
from gatera_lightning.peft.config import GateRAConfig
from gatera_lightning.peft.layer import GateRALinear


class GateRAModel(BaseTuner):
    """A model whose linear layers have gated adapters; ``get_peft_model`` creates it."""

    prefix = "gatera_"
    tuner_layer_cls = GateRALinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Choose the modules to adapt, if the settings do not."""
        if peft_config.target_modules is None:
            present = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
            if set(usual := AdapterConfig().target_modules) <= present:
                peft_config.target_modules = set(usual)
        if (layers := peft_config.layers_to_transform) is not None:
            layers = [layers] if isinstance(layers, int) else layers
            peft_config.layers_to_transform = positive_indices(self.model, layers)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Check that an adapter which was loaded from a folder belongs to this backbone.

        Raises:
            AdapterFileError: If it was trained on another backbone; the model is then unchanged.
        """
        config = cast(GateRAConfig, peft_config)
        if not config.gatera.get("fingerprint"):
            return
        found: dict[str, WeightFingerprint] = {}
        weights: list[Tensor] = []
        adapted: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if (name.startswith(adapted) and adapted) or not self._check_target_module_exists(config, name):
                continue
            if isinstance(module, GateRALinear):
                found[name] = module.base_fingerprint
                weights.append(module.base_layer.weight)
                adapted = (*adapted, f"{name}.")
            elif isinstance(module, nn.Linear):
                found[name] = weight_fingerprint(module.weight)
                weights.append(module.weight)
        origin = {"id": config.base_model_name_or_path, "revision": config.revision} | config.gatera
        own = {version: backbone_fingerprint(found, version) for version in (1, 2, 3)}
        if all(all(fingerprint) for fingerprint in found.values()) and (
            problem := backbone_problem(own, origin)
        ):
            raise AdapterFileError(f"this adapter {problem}")
        warn_of_other_quantization("this adapter", config.gatera, weights)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter to a model, and remember for which backbone it is."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        adapted = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, GateRALinear) and adapter_name in module.gatera_config
        }
        layers = {name: module.base_fingerprint for name, module in adapted.items()}
        if all(all(fingerprint) for fingerprint in layers.values()):
            storage = quantization_while_loading(module.base_layer.weight for module in adapted.values())
            cast(GateRAConfig, self.peft_config[adapter_name]).set_backbone(
                ({} if storage == "none" else {"quantization": storage})
                | {
                    "fingerprint": backbone_fingerprint(layers),
                    "fingerprint_float16": backbone_fingerprint(layers, 3),
                    "attn_implementation": getattr(
                        getattr(model, "config", None), "_attn_implementation", None
                    ),
                }
            )

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Adapt one layer, or add an adapter to a layer that has one.

        Raises:
            ConfigError: If the module cannot be adapted, or is too small for the rank.
        """
        config = cast(GateRAConfig, peft_config).for_module(current_key)
        base = target.get_base_layer() if isinstance(target, GateRALinear) else target
        if problem := self._problem(base, current_key, config):
            raise ConfigError(problem)
        if isinstance(target, GateRALinear):
            target.add_adapter(adapter_name, config)
            return
        layer = GateRALinear(cast(nn.Linear, base), adapter_name, config)
        if adapter_name not in self.active_adapters:  # a further adapter is not trainable until it is active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _problem(self, base: nn.Module, name: str, config: AdapterConfig) -> str | None:
        if not isinstance(base, nn.Linear):
            return f"target_modules: {name} is a {type(base).__name__}; accepted: linear layers"
        smaller, rank = min(base.in_features, base.out_features), config.rank
        sizes = base.in_features, base.out_features
        if problem := UPDATES[config.update].size_problem(*sizes, **config.extra_settings):
            return f"{config.extra_settings} does not suit {name} ({sizes[0]} -> {sizes[1]}): {problem}"
        if rank > smaller:
            return (
                f"r: {rank} exceeds {name} ({base.in_features} -> {base.out_features}); "
                f"accepted here: 1 to {smaller}"
            )
        return weight_problem(name, base, others_have_memory=not base.weight.is_meta)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return the name in a file of a parameter, which may be of a submodule of an update or a gate."""
        for part in GateRALinear.adapter_layer_names:
            if f".{part}.{adapter_name}." in key:
                return key.replace(f".{part}.{adapter_name}.", f".{part}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)
