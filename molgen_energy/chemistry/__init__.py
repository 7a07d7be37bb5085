"""Bonds, RDKit, and files of molecules."""
