"""Generate text with an adapted model."""

from gatera_lightning.generation.decoding import DecodingConfig, Sampling, end_tokens, generate

__all__ = ["DecodingConfig", "Sampling", "end_tokens", "generate"]
