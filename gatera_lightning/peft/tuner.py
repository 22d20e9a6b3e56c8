"""PEFT's tuner of the method: which modules of a model get a gated layer."""

from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_HIRA_TARGET_MODULES_MAPPING
from torch import nn

from gatera_lightning.adapters.config import AdapterConfig
from gatera_lightning.adapters.linear_layers import weight_problem
from gatera_lightning.errors import ConfigError
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
        return super()._prepare_adapter_config(peft_config, model_config)

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
        if problem := self._problem(base, current_key, config.rank):
            raise ConfigError(problem)
        if isinstance(target, GateRALinear):
            target.add_adapter(adapter_name, config)
            return
        layer = GateRALinear(cast(nn.Linear, base), adapter_name, config)
        if adapter_name not in self.active_adapters:  # a further adapter is not trainable until it is active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _problem(self, base: nn.Module, name: str, rank: int) -> str | None:
        if not isinstance(base, nn.Linear):
            return f"target_modules: {name} is a {type(base).__name__}; accepted: linear layers"
        smaller = min(base.in_features, base.out_features)
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
