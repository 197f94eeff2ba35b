"""The packed format: pruned weights without their zeros, kernels that multiply them, and a speed test."""
