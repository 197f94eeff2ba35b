"""Views for use between runs: results, norms, needs, costs, the machine."""
