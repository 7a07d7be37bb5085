"""Evaluation of samples: checks, distances from reference data, reports. Imports no torch."""
