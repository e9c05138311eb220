"""Where and how state is laid out: checkpoints."""
