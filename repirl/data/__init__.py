"""Prompts and expert trajectories."""
