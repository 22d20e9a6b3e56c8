"""The method: a gated update of a frozen linear layer, ``y = W0 x + b + g(x) · u(x)``."""
