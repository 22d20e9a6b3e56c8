"""How rows become prompts."""
