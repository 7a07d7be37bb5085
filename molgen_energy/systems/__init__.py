"""Physical systems: each is its data, its model, its loss, and how it is sampled."""
