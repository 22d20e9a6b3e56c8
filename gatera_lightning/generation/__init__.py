"""Text generation with an adapted model."""
