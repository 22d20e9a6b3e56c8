"""Tasks: how a row becomes an example."""
