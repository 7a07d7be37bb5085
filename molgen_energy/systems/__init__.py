"""Physical systems: each is its configuration, its network, its loss, and how it is sampled."""
