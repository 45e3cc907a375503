"""Many requests at once on one group of ranks."""
