"""Training: one step, its optimizer, and what keeps it safe."""
