"""Metrics of generated molecules. No module here imports torch."""
