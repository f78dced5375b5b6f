"""`python -m scalabl`: the command line, for launchers that start modules (`accelerate launch -m scalabl train`)."""

from scalabl.cli import main

if __name__ == "__main__":
    main()
