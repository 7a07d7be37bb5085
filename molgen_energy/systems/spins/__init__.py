"""Spin glasses: data, ground states, training, sampling and metrics."""
