"""A LightningModule whose trainable part, and whose state, is an adapter."""

from collections.abc import Mapping
from typing import Any, Self

import lightning as L
from transformers import PreTrainedModel

from gatera_lightning.adapters.lookup import adapter_parameters
from gatera_lightning.training.checkpoint_contents import adapter_key_problems, keep_adapter_tensors


class AdapterModule(L.LightningModule):
    """Holds an adapted model as ``model``; everything but the adapter stays frozen and out of checkpoints."""

    model: PreTrainedModel  # None until configure_model

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the adapter's tensors only: a checkpoint never holds the backbone."""
        state = super().state_dict(*args, **kwargs)
        keep_adapter_tensors(state, self.model, kwargs.get("prefix", ""))
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the adapter's tensors; frozen tensors may be missing."""
        keys = super().load_state_dict(state_dict, strict=False, assign=assign)
        return type(keys)(*adapter_key_problems(self.model, *keys, strict=strict))

    def unfreeze(self) -> Self:
        """Undo :meth:`freeze`: make the adapter trainable again. The backbone stays frozen."""
        if self.model is not None:
            for parameter in adapter_parameters(self.model).values():
                parameter.requires_grad = True
        return self.train()
