"""Generated tasks with an exact expert: no download, unlimited data, known truth."""
