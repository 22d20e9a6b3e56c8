"""Examples as token ids and loss masks, cached on disk."""
