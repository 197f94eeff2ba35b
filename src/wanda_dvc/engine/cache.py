"""The folder of compiled kernels."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return this package's folder in the user's cache directory; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanda-dvc"
