"""Text in a terminal that others have written."""
