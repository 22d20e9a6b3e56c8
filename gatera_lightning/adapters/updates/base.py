"""The contract of an update: what an adapter adds to a frozen linear layer."""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gatera_lightning.adapters.gates import GateValues
from gatera_lightning.adapters.unchanged_parameters import UnchangedParameters


class Update(nn.Module, ABC):
    """An update ``u`` of a frozen linear layer, which then computes ``W0 x + b + g(x) · u(x)``.

    A subclass defines ``u`` in :meth:`delta` and :meth:`delta_weight`; the rest is optional. It may override
    :meth:`forward` with a cheaper form and :meth:`inference_constant` with what generation can compute once.

    Args:
        base: The frozen layer.
        rank: Rank r of ``BA``.
        scale: ``alpha / rank``; 1 for an update without a scale.
        dtype: Dtype of the trainable parameters.
        generator: CPU generator that draws A; the same generator gives the same adapter on every device and
            rank.
    """

    name: ClassVar[str]
    """Name of the update in configs and adapter folders."""

    formula: ClassVar[str]
    """What the update computes, on one line for ``--help``."""

    has_scale: ClassVar[bool] = True
    """Whether ``alpha`` is a setting of this update."""

    extra_settings: ClassVar[tuple[str, ...]] = ()
    """Settings of AdapterConfig that the constructor takes besides rank and scale, and that u depends on."""

    training_settings: ClassVar[tuple[str, ...]] = ()
    """Further ones that change training steps only, and not what a trained adapter computes."""

    uses_gate_thresholds: ClassVar[bool] = False
    """Whether :meth:`forward` skips work for tokens whose gate values are beyond the gate's thresholds."""

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        scale: float,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        a = torch.empty(rank, base.in_features, dtype=dtype, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(base.out_features, rank, dtype=dtype, device="cpu")
        self.a = nn.Parameter(a.to(base.weight.device))  # (r, in)
        self.b = nn.Parameter(
            b.to(base.weight.device)
        )  # (out, r), zero: training starts from the frozen model
        self.scale = scale
        self._cached: Tensor | None = None
        self._unchanged: UnchangedParameters | None = None

    @classmethod
    def rank_problem(cls, rank: int, **settings: Any) -> str | None:
        """Describe why a rank does not suit this update and its extra settings; None if it does."""
        return None

    @classmethod
    def size_problem(cls, in_features: int, out_features: int, **settings: Any) -> str | None:
        """Describe why a layer's size does not suit this update's extra settings; None if it does."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) of the product BA."""
        return self.a, self.b

    def low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """Return A (r, in) and B (out, r) with ``u(x) = B A x``; None if u is not of this form."""
        return None

    @abstractmethod
    def delta(self, x: Tensor, base: nn.Linear) -> Tensor:
        """Compute ``u(x)`` as defined, without the savings of :meth:`forward`: (..., in) -> (..., out)."""

    @abstractmethod
    def delta_weight(self, weight: Tensor) -> Tensor:
        """Return ΔW with ``u(x) = ΔW x``, (out, in), in the adapter's dtype, for merging into ``weight``."""

    def delta_with_dropout(self, x: Tensor, base: nn.Linear, dropout: nn.Module) -> Tensor:
        """Compute ``u(x)`` with dropout on the update's input: (..., in) -> (..., out)."""
        return self.delta(dropout(x), base)

    def forward(self, x: Tensor, base: nn.Linear, gate: GateValues | None, dropout: nn.Module) -> Tensor:
        """Compute the output of the adapted layer, ``W0 x + b + g(x) · u(x)``.

        Args:
            x: Input, (..., in).
            base: The frozen layer.
            gate: Gate values (...); None for ``g = 1``.
            dropout: Dropout on the update's input; an ``nn.Identity`` if there is none.

        Returns:
            The output, (..., out), in the dtype of ``base(x)``.
        """
        y = base(x)
        return add_gated(y, self.delta_with_dropout(x, base, dropout), gate)

    def inference_constant(self, weight: Tensor) -> Tensor | None:
        """Compute what :meth:`forward` can reuse while no parameter changes; None if there is nothing."""
        return None

    def inference_constant_bytes(self, weight: Tensor) -> int:
        """Return the size of :meth:`inference_constant` in bytes, or 0 if it is small."""
        return 0

    @property
    def is_prepared(self) -> bool:
        """Whether an inference constant is cached."""
        return self._cached is not None

    def prepare(self, base: nn.Linear) -> None:
        """Cache the :meth:`inference_constant`; parameters must not change until :meth:`release`."""
        with torch.no_grad():
            self._cached = self.inference_constant(base.weight)
        self._unchanged = UnchangedParameters(self, base)

    def release(self) -> None:
        """Drop what :meth:`prepare` cached."""
        self._cached = self._unchanged = None

    def cached(self) -> Tensor | None:
        """Return the cached inference constant, if any.

        Raises:
            RuntimeError: If gradients are enabled, or a parameter changed after :meth:`prepare`.
        """
        if self._cached is not None and self._unchanged is not None:
            require_no_grad()
            self._unchanged.check()
        return self._cached


def add_gated(y: Tensor, u: Tensor, gate: GateValues | None) -> Tensor:
    """Return ``y + g · u`` in y's dtype; y and u (..., out), g (...)."""
    return y + (u if gate is None else u * gate.values.unsqueeze(-1).to(u.dtype)).to(y.dtype)


def require_no_grad() -> None:
    """Raise RuntimeError if gradients are enabled: cached products would pass none to the adapter."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "prepared_for_inference needs torch.no_grad(): cached products pass no gradient to the adapter"
        )
