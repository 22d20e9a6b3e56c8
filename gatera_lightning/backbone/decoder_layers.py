"""Find a model's decoder layers, which are sharded and compiled one at a time."""

from torch import nn

from gatera_lightning.adapters.lookup import adapted_linears


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the list of decoder layers: the outermost ModuleList that holds adapted layers.

    Raises:
        ValueError: No adapted layer is inside a ModuleList.
    """
    adapted = set(adapted_linears(model))
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(path.startswith(f"{name}.") for path in adapted):
            return module
    raise ValueError("cannot find the decoder layers: no adapted linear layer is inside an nn.ModuleList")
