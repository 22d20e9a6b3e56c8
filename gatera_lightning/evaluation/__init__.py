"""Evaluation: score answers, store predictions, and compare runs with intervals and paired tests."""
