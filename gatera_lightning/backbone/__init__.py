"""The frozen model: load it, probe it, run it cheaply."""
