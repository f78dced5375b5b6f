"""What the program says, and the arguments of a short training run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiny_base import tiny_base


@dataclass(frozen=True)
class Said:
    """What the program said."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Its one sentence on standard error, after exit code 2 and silence on standard output."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("scalabl: "), self.err
        return lines[0].removeprefix("scalabl: ")


Program = Callable[..., Said]


def train_arguments(data: object, output: Path, *more: object) -> tuple[object, ...]:
    """Two steps on the tiny model."""
    return ("train", "--model", tiny_base(), "--data", data, "--output", output, "--steps", 2, "--rank", 4, *more)
