"""From token tables to the batches of each optimizer step."""
