"""How good molecules are. Nothing here needs a network or torch."""
