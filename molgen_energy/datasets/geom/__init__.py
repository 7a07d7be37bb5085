"""Layouts of the files of GEOM-Drugs, one module each; `recognition` detects which one it is."""
