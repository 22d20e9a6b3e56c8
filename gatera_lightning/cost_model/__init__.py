"""Predicted memory and FLOPs of a training step."""
