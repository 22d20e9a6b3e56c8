"""Answers: how the answer is parsed from generated text."""
