"""Training: one step, its optimizer, and its checks."""
