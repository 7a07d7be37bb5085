"""Molecules: configuration, fields, training task and generator."""
