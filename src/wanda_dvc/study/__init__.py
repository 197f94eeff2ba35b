"""A study on disk: its settings, artifacts, provenance and revisions."""
