"""The position gate: the caller says which tokens the update applies to (as activated LoRA, aLoRA, does)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gatera_lightning.adapters.gates.base import Gate, GateConfig, GateValues

_LOGIT = 40.0
"""|z| of a recorded gate: σ(z) is 1 or 4e-18, and the entropy is finite."""


@dataclass
class GivenMask:
    """A mask over the tokens of one forward pass, which the gates of all layers share."""

    mask: Tensor
    """Bool, (batch, tokens), or (tokens,) for every sequence; True where the update applies."""

    _selected: dict[tuple[tuple[int, ...], torch.device], Tensor] = field(default_factory=dict, repr=False)
    """Indices by the shape of the tokens and the device; finding them waits for a GPU, so all share them."""

    def problem(self, tokens: tuple[int, ...]) -> str | None:
        """Describe why the mask does not fit tokens of this shape; None if it does."""
        own = tuple(self.mask.shape)
        fits = tokens[-1:] == own if len(own) == 1 else tokens in (own, (self.mask.numel(),))
        return None if fits else f"the mask is {own}, and the tokens are {tokens}"

    def over(self, tokens: tuple[int, ...]) -> Tensor:
        """Return the mask in the shape of the tokens.

        Raises:
            ValueError: If it does not fit.
        """
        if problem := self.problem(tokens):
            raise ValueError(
                f"position_mask: {problem}; accepted: a mask (batch, tokens) or (tokens,) of the forward "
                "pass. A layer that sees a part of the tokens only, as an expert does, cannot have a "
                "position gate."
            )
        return self.mask.expand(tokens) if self.mask.ndim == 1 else self.mask.reshape(tokens)

    def selected(self, tokens: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the indices into the flattened tokens where the mask is True, (n,)."""
        key = tokens, device
        if key not in self._selected:
            self._selected[key] = self.over(tokens).flatten().nonzero().squeeze(1).to(device)
        return self._selected[key]


class PositionGate(Gate):
    """``g`` is 0 or 1, from a mask that :func:`~gatera_lightning.position_mask` gives; nothing is trained.

    A layer computes the update for tokens with 1 only. For a token with 0, its output is that of the frozen
    layer, bit for bit.
    """

    depends_on_token = True
    decides = True
    selects_tokens = True

    def __init__(self, *, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._given: GivenMask | None = None

    @property
    def given(self) -> GivenMask | None:
        """The mask of the present forward pass, if any."""
        return self._given

    def set_mask(self, given: GivenMask | None) -> None:
        """Set the mask of the next forward pass; None removes it."""
        self._given = given

    def selected_tokens(self, x: Tensor) -> Tensor:
        """Return the indices into the flattened tokens with gate 1: (..., in) -> (n,)."""
        return self._mask().selected(tuple(x.shape[:-1]), x.device)

    def forward(self, x: Tensor, base_out: Tensor | None = None, update_out: Tensor | None = None) -> Tensor:
        """Return 40 for tokens with 1 and -40 for others, for recordings: (..., in) -> (...)."""
        mask = self._mask().over(tuple(x.shape[:-1])).to(x.device)
        return torch.where(mask, _LOGIT, -_LOGIT).to(self._dtype)

    def values(self, logit: Tensor) -> GateValues:
        """Return 1 where the logit is above 0, and 0 elsewhere."""
        return GateValues((logit > 0).to(logit.dtype))

    def _mask(self) -> GivenMask:
        if self._given is None:
            raise RuntimeError(
                "a position gate needs a mask of the tokens; accepted: a forward pass inside "
                "gatera_lightning.position_mask(model, mask). With gradient checkpointing, the backward pass "
                "too, because it runs the layers again."
            )
        return self._given


@dataclass
class PositionGateConfig(GateConfig):
    """The update applies where a mask says so, which the caller gives with every forward pass."""

    kind = "position"
    formula = "1 where a given mask is 1, else 0"
    needs_mask = True

    mask_embeddings: int = 0
    """With SelfDraft's form MaskEmbeddings, the number of learned embeddings that draft rows read, and so the
    longest draft; the adapter has a sampler head, too. 0 means that draft rows read tokens."""

    def problems(self) -> list[str]:
        """Return one message for every invalid value; empty if all are valid."""
        value, found = self.mask_embeddings, super().problems()
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            found.append(
                f"adapter.gate.mask_embeddings: {value!r}; accepted: an integer of at least 0, where 0 means "
                "none"
            )
        return found

    def build(self, in_features: int, *, dtype: torch.dtype, device: torch.device) -> PositionGate:
        """Create a :class:`PositionGate`."""
        return PositionGate(dtype=dtype)

    @property
    def saturates(self) -> bool:
        """Always: only tokens with 1 need the update."""
        return True
