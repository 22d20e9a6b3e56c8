"""What `python -m gatera_lightning` can do beside LightningCLI's verbs: one verb a file."""
