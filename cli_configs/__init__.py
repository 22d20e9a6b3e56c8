"""The shipped recipes: one YAML per recipe, overlays to combine with them by several ``--config``."""
