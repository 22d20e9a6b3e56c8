"""Plots of gate values."""
