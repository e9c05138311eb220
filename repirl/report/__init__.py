"""What a run shows: metrics on disk, progress on the screen, a page at the end."""
