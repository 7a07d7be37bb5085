"""Distances between distributions: MMD, Wasserstein, total variation, FCD."""
