"""Checkpoints: atomic files, integrity checks and exact resume."""
