"""Pictures of gate values."""
