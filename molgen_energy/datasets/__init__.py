"""Datasets of molecules; `molgen_energy.systems.datasets` registers them."""
