"""A comparison of methods over learning rates, seeds and families of tasks, kept in a ledger."""
