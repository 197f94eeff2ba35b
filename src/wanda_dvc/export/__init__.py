"""Pruned models of any experiment, as ordinary directories with a model card."""
