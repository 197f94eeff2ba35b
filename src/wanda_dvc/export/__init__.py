"""Pruned models of any experiment, in a table of formats, each with a model card."""
