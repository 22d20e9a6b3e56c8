"""What the benchmarks share: timing, memory measurements, and the steps and training loops to measure."""
