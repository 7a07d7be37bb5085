"""Checks of single molecules: stability, validity, PoseBusters, strain energy."""
