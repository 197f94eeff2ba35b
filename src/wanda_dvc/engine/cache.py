"""Where compiled kernels are kept for later processes."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return this package's folder in the user's own cache directory; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanda-dvc"
