"""Where downloaded and converted files are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$SCALABL_CACHE`, or `~/.cache/scalabl`."""
    return Path(os.environ.get("SCALABL_CACHE") or Path.home() / ".cache" / "scalabl")
