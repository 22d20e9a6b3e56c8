"""Sources of data: what a source string means, and how rows are read from files, URLs and the hub."""
