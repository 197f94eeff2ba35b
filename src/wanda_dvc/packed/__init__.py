"""The packed format: pruned weights without their zeros, the kernels that multiply them, and how fast that is."""
