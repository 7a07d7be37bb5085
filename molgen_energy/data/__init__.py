"""Molecules in memory and on disk."""
