"""The subcommands beside LightningCLI's own."""
