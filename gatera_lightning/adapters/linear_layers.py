"""Which linear layers can be adapted, and which of them compute nothing but ``W0 x + b``."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from gatera_lightning.adapters.packed_weight import PackedWeight

_UNQUANTIZED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ADAPTABLE = (Tensor, nn.Parameter, DTensor, FakeTensor, PackedWeight)

_ACCEPTED = (
    "accepted: weights that are not quantized, or layers of bitsandbytes, torchao or optimum-quanto after "
    "gatera_lightning.backbone.quantization.read_quantized_layers(model)"
)


def has_plain_forward(linear: nn.Linear) -> bool:
    """Return whether calling a layer computes ``W0 x + b`` and nothing else.

    A subclass may override ``forward``, a library may replace it on the instance, and hooks may change the
    input and the output. What the layer computes is then only known by calling it.
    """
    return type(linear).forward is nn.Linear.forward and not is_modified(linear)


def is_modified(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its class: by hooks, or by a replaced ``forward``.

    Hooks of all modules (``register_module_forward_hook``) count as well.
    """
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _all_modules_have_hooks()
    )


def _all_modules_have_hooks() -> bool:
    registered = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    # The hooks of FlopCounterMode only note which module runs. It must count the usual computation.
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for hooks in registered
        for hook in hooks.values()
    )


def weight_problem(name: str, linear: nn.Linear, *, others_have_memory: bool) -> str | None:
    """Describe why the weight of a layer cannot be adapted; None if it can.

    Args:
        name: Name of the layer.
        linear: The layer.
        others_have_memory: Whether other parameters of the model are in memory. A layer on the meta device is
            then offloaded; in a model that is only on the meta device, nothing has values.
    """
    layer = f"backbone.id: {name} is a {type(linear).__name__}"
    weight = linear._parameters.get("weight")
    if weight is None:
        return (
            f"{layer} whose weight is computed from other tensors (a parametrization such as weight_norm, or "
            "pruning); accepted: plain weights. To make it plain, call "
            "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove"
        )
    if type(weight) not in _ADAPTABLE or type(weight.data) not in _ADAPTABLE:
        return f"{layer} whose weight is a {_class_name(weight)}; {_ACCEPTED}"
    shape, dtype = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
    if weight.dtype not in _UNQUANTIZED or shape != (linear.out_features, linear.in_features):
        return f"{layer} whose weight is {dtype} {shape}; {_ACCEPTED}"
    if weight.is_meta and (others_have_memory or hasattr(linear, "_hf_hook")):
        return (
            f"{layer} whose weight is on the meta device (offloaded to disk or CPU memory by accelerate, or "
            "never loaded); accepted: a model that is loaded whole, without offloading in its device_map"
        )
    return None


def _class_name(weight: Tensor) -> str:
    return next(kind.__name__ for kind in (type(weight.data), type(weight)) if kind not in _ADAPTABLE)
