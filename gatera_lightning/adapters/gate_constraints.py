"""Keep the parameters of gates in their range while they are trained."""

from torch import nn
from torch.optim import Optimizer

from gatera_lightning.adapters.lookup import adapted_linears


def constrain_gates_after_steps(optimizer: Optimizer, model: nn.Module) -> None:
    """Call :meth:`Gate.constrain` of every gate after each step of an optimizer.

    Args:
        optimizer: The optimizer that trains the gates.
        model: A model with an adapter.
    """
    gates = [layer.gate for layer in adapted_linears(model).values() if layer.gate is not None]

    def constrain(*_: object) -> None:
        for gate in gates:
            gate.constrain()

    optimizer.register_step_post_hook(constrain)
