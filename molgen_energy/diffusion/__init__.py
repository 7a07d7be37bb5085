"""Fields and states, noise processes, the training objective, and samplers."""
