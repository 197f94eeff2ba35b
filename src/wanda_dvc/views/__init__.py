"""Views for use between runs: statistics, the machine."""
