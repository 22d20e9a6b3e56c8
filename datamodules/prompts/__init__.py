"""Prompts: how a request, a conversation or a dialogue becomes the text that a model reads."""

from gatera_lightning.datamodules.prompts.templates import Template, render

__all__ = ["Template", "render"]
