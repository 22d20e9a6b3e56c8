"""Tasks: data modules that know the format of their rows and build examples from them."""
