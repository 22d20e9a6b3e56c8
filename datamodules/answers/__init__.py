"""How an answer is read from generated text."""
