"""Where slimwright keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$SLIMWRIGHT_CACHE``, else ``$XDG_CACHE_HOME/slimwright``, else ``~/.cache/slimwright``; may not exist."""
    own = os.environ.get("SLIMWRIGHT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimwright"
