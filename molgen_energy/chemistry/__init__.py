"""Elements, bonds, RDKit, and files of molecules."""
