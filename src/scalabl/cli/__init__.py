"""The command line: parse, call, print. torch is imported only by commands that need it, after their checks."""

from scalabl.cli.main import main

__all__ = ["main"]
