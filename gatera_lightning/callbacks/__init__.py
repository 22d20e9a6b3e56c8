"""Everything periodic: one callback a file; none changes a step."""
