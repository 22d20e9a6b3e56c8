"""How good is it: scoring of answers, and the numbers that say how sure one may be."""
