"""Gate values: capture, statistics, reports and plots."""
