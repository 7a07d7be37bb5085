"""Readers of the data sets that `preprocess` turns into HDF5."""
