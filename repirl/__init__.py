"""rePIRL: process reward models for LLM reasoning by inverse reinforcement learning."""

from importlib.metadata import version

__version__ = version("repirl")
