"""What people look at between runs: results, norms, needs, costs, the machine."""
