"""Examples as token ids, cached."""
