"""A study on disk: its settings, artifacts, provenance, times and revisions."""
