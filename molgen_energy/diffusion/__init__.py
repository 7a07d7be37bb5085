"""Noising, the training objective, and sampling."""
