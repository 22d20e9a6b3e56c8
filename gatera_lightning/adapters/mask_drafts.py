"""Mask embeddings and a sampler head: what draft rows learn besides an update (Samragh et al., 2507.11851).

They belong to a model and not to one of its layers, so an adapter with them is more than a LoRA.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatera_lightning.errors import ConfigError

MASK_DRAFTS = "mask_drafts"
"""Name of the module in an adapted model, and of its tensors in an adapter folder."""

_INITIAL = 0.02
"""Standard deviation of the initial values, the usual ``initializer_range`` of language models."""


class MaskDrafts(nn.Module):
    """k embeddings that draft rows read instead of tokens, and a sampler head that chooses their drafts.

    The row of depth d, from 1, reads embedding d. The sampler head knows the token before a draft, which the
    row does not; from its embedding e and the row's latent z, the input of the model's output head, it
    computes ``z + W₂ silu(W₁ [e; z] + b₁) + b₂``, another input of that head. ``W₂`` and ``b₂`` start at 0.

    Args:
        count: Number of embeddings k.
        width: Size of an embedding and of a latent.
        dtype: Dtype of the parameters.
        device: Their device.
        generator: CPU generator that draws the initial values.
    """

    def __init__(
        self,
        count: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()

        def drawn(*shape: int) -> nn.Parameter:
            values = _INITIAL * torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
            return nn.Parameter(values.to(device))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

        # No nn.Linear: whatever adapts or quantizes the linear layers of a model leaves these as they are.
        self.embeddings = drawn(count, width)
        self.sampler_in, self.sampler_in_bias = drawn(width, 2 * width), zeros(width)
        self.sampler_out, self.sampler_out_bias = zeros(width, width), zeros(width)

    def sampler(self, previous: Tensor, latents: Tensor) -> Tensor:
        """Return what the output head receives for a draft.

        Args:
            previous: The embedding of the token before it, (..., width).
            latents: The latent of its draft row, (..., width).
        """
        pair = torch.cat([previous, latents], -1).to(self.sampler_in.dtype)  # (..., 2 · width)
        hidden = F.silu(F.linear(pair, self.sampler_in, self.sampler_in_bias))
        return latents + F.linear(hidden, self.sampler_out, self.sampler_out_bias).to(latents.dtype)

    @contextmanager
    def on_last_rows(self, model: nn.Module, depths: Tensor) -> Iterator[None]:
        """Inside the ``with`` block, the last rows of each sequence read mask embeddings, whatever their ids.

        Args:
            model: The language model.
            depths: From 1 to k, (batch, rows), or (1, rows) for every sequence.
        """

        def embed(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:  # (batch, tokens, width)
            learned = F.embedding(depths.to(y.device) - 1, self.embeddings).to(y.dtype)
            tokens = y.shape[1] - depths.shape[1]
            return torch.cat([y[:, :tokens], learned.expand(len(y), -1, -1)], 1)

        handle = _token_embeddings(model).register_forward_hook(embed)
        try:
            yield
        finally:
            handle.remove()


def build_mask_drafts(
    model: nn.Module, count: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> MaskDrafts:
    """Create mask embeddings and a sampler head for a language model.

    Args:
        model: The language model.
        count: Number of mask embeddings.
        dtype: Dtype of the parameters.
        generator: CPU generator that draws the initial values.

    Raises:
        ConfigError: If it is no model with an output head over latents of the size of its embeddings.
    """
    asked = f"adapter.gate.mask_embeddings: {count}, but {type(model).__name__}"
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if head is None:
        raise ConfigError(f"{asked} has no output head; accepted: 0, or a causal language model")
    weight: Tensor = _token_embeddings(model).weight
    width = weight.shape[-1]
    if head.in_features != width:
        raise ConfigError(
            f"{asked} has embeddings of {width} and an output head that reads {head.in_features} values; "
            "accepted: 0, or a model with equal sizes"
        )
    return MaskDrafts(count, width, dtype=dtype, device=weight.device, generator=generator)


def stored_mask_drafts(
    model: nn.Module, count: int, tensors: Mapping[str, Tensor]
) -> tuple[MaskDrafts | None, str | None]:
    """Create the mask embeddings and the sampler head of an adapter folder, which stay outside of the model.

    Args:
        model: The language model to draft for.
        count: The number of mask embeddings that the folder's settings say.
        tensors: The folder's tensors of these, by their names in :class:`MaskDrafts`.

    Returns:
        The module in evaluation mode, None if the adapter has none; and what is wrong with the tensors.
    """
    if not count:
        return None, f"unexpected tensors ({MASK_DRAFTS}.{min(tensors)}, …)" if tensors else None
    dtypes = {tensor.dtype for tensor in tensors.values()} | {_token_embeddings(model).weight.dtype}
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    found = build_mask_drafts(model, count, wide).requires_grad_(False).eval()
    expected = {name: tuple(parameter.shape) for name, parameter in found.named_parameters()}
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            return None, (
                f"{MASK_DRAFTS}.{name} has shape {given.get(name)}, and this model needs {expected.get(name)}"
            )
    for name, parameter in found.named_parameters():
        parameter.copy_(tensors[name])
    return found, None


def _token_embeddings(model: nn.Module) -> Any:
    get: Any = model.get_input_embeddings
    return get()
