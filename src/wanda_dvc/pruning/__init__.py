"""The core: scores, selection, patterns, statistics. Tensors in, tensors out; no paths, no printing, no settings."""
