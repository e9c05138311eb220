"""Benchmarks of the ops beside their peers; see README.md in this folder."""
