"""Verifiers: outcome rewards."""
