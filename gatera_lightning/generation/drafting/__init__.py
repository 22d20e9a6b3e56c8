"""Decode several tokens per forward pass with a draft adapter; the text is that of plain decoding."""

from gatera_lightning.generation.drafting.config import DraftConfig
from gatera_lightning.generation.drafting.counts import DraftCounts
from gatera_lightning.generation.drafting.drafter import Drafter

__all__ = ["DraftConfig", "DraftCounts", "Drafter"]
