"""Where the draft rows of a batch stand, and what each of them may attend to.

In decoding, a draft of n tokens follows a seed, the last token that is known: n rows with random token ids at
the positions after the seed. In training, the supervised tokens of a sequence are cut into blocks, and each
block is such a draft, whose seed is the token before it:

    clean rows    the sequence itself, causal
    draft rows    one for each supervised token, at its position; it attends to the clean rows before its
                  block, and to the rows of its block up to itself
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gatera_lightning.datamodules.batch import IGNORE_INDEX


@dataclass(frozen=True)
class DraftLayout:
    """The draft rows of each sequence, padded to the largest number of any sequence, at least one."""

    columns: Tensor
    """(batch, rows), int64: the column of the supervised token in whose place a row stands, ascending."""

    is_draft: Tensor
    """(batch, rows), bool: False for padding, which attends to itself only."""

    starts: Tensor
    """(batch, rows), int64: the column of the first row of each row's block."""

    @classmethod
    def of(cls, labels: Tensor, size: int, offsets: Tensor) -> Self:
        """Cut the supervised tokens into blocks.

        A block never crosses a token that is not supervised. Offsets move the borders, so that over several
        steps a token has every depth.

        Args:
            labels: (batch, tokens); ``IGNORE_INDEX`` for a token that is not supervised, as the first of a
                sequence always is.
            size: Rows of a block.
            offsets: (batch,), int64, at least 0 and below ``size``: how many rows are missing in a
                sequence's first block.
        """
        supervised = labels != IGNORE_INDEX
        column = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        begins = supervised & ~supervised.roll(1, 1)  # the first column is not supervised
        first = (column * begins).cummax(1).values  # of the run of supervised tokens that a column is in
        block = (column - first + offsets.unsqueeze(1)) // size
        starts = torch.maximum(first, first + block * size - offsets.unsqueeze(1))
        rows = max(1, int(supervised.sum(1).max()))
        order = (~supervised).int().argsort(dim=1, stable=True)[:, :rows]  # supervised tokens first
        return cls(order, supervised.gather(1, order), starts.gather(1, order))

    @property
    def depths(self) -> Tensor:
        """(batch, rows): 1 for the first row of a block, which predicts the first token of the draft."""
        return self.columns - self.starts + 1

    def selects_clean(self, tokens: int) -> Tensor:
        """Return where the clean rows of the supervised tokens are, (batch, tokens), bool."""
        empty = torch.zeros(len(self.columns), tokens, dtype=torch.bool, device=self.columns.device)
        return empty.scatter(1, self.columns, self.is_draft)

    def attention_mask(self, attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what is added to the attention scores of draft rows: 0, or the lowest number of ``dtype``.

        Args:
            attention_mask: (batch, tokens), 1 = not padding.
            dtype: Dtype of the scores.

        Returns:
            (batch, 1, rows, tokens + rows); the clean rows come first, then the draft rows.
        """
        device, (tokens, rows) = attention_mask.device, (attention_mask.shape[1], self.columns.shape[1])
        starts, is_draft = self.starts.to(device), self.is_draft.to(device)
        column = torch.arange(tokens, device=device)
        clean = column < (starts * is_draft).unsqueeze(2)  # (batch, rows, tokens)
        clean &= attention_mask.bool().unsqueeze(1)
        same_block = starts.unsqueeze(2) == starts.unsqueeze(1)  # (batch, rows, rows)
        same_block &= is_draft.unsqueeze(2) & is_draft.unsqueeze(1)
        draft = same_block.tril() | torch.eye(rows, dtype=torch.bool, device=device)
        hidden = ~torch.cat([clean, draft], 2)
        scores = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return scores.masked_fill(hidden, torch.finfo(dtype).min).unsqueeze(1)
