"""Recovery: the one part that holds a complete model."""
