"""repirl plan: what a run will need of memory."""
