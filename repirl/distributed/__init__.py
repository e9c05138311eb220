"""Where and how state is laid out: processes, shards, and models that are idle."""
