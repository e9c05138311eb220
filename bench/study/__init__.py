"""The study: where the training systems differ, on tasks that a CPU trains in a minute."""
