"""Evaluation: score answers, store predictions, and compare runs with confidence intervals and paired tests."""
