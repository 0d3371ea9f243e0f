"""Many tasks on one model: their registry, their names, their heads, and ``generate``."""
