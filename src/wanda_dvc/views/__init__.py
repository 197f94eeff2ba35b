"""Views for use between runs: results, norms, statistics, the machine."""
