"""Where rows come from: sample data, files, the hub."""
