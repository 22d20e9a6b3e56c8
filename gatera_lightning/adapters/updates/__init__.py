"""Updates of a frozen linear layer: LoRA, DoRA, HiRA."""
