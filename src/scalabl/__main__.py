"""`python -m scalabl`: the command line, for launchers that start modules (`accelerate launch -m scalabl train`)."""

import sys
from pathlib import Path

# `-m` puts the current directory in front of the path: only a checkout's own has anything to be found there
if not sys.flags.safe_path and __name__ == "__main__" and Path(sys.path[0]) != Path(__file__).parents[1]:
    del sys.path[0]

from scalabl.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
