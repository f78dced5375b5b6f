"""What the program writes, and the arguments of a short training run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_base import tiny_base

from scalabl.runs.settings import Settings


class Output(NamedTuple):
    """What the program wrote, and its exit code."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """Its one sentence on standard error, after exit code 2 and no result on standard output."""
        assert self.code == 2, self
        # a training writes what it takes and reads before it begins
        told = ("training: ", "memory: ", "template: ", "first row: ")
        assert all(line.startswith(told) for line in self.out.splitlines())
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("scalabl: "), self.err
        return lines[0].removeprefix("scalabl: ")


Program = Callable[..., Output]


def train_arguments(data: object, output: Path, *more: object) -> tuple[object, ...]:
    """Two steps on the tiny model."""
    return ("train", "--model", tiny_base(), "--data", data, "--output", output, "--steps", 2, "--rank", 4, *more)


def short(task: Path, **changes: object) -> Settings:
    """Four steps of training."""
    settings: dict[str, object] = {
        "model": str(tiny_base()), "data": str(task), "steps": 4, "batch_size": 4, "r": 4, "layers": "last:2",
        "scoring": "continuation", "normalization": "token", "validation_rows": 4,
    }  # fmt: skip
    return Settings.flat(**{**settings, **changes})  # type: ignore[arg-type]


@contextmanager
def batches_of(monkeypatch: pytest.MonkeyPatch, *, killed_at: int | None = None) -> Iterator[list[int]]:
    """How many rows each call of `Predictor.answers` has; Ctrl-C comes in call `killed_at`, counted from 1."""
    from scalabl.inference.predictor import Predictor

    answers, calls = Predictor.answers, []

    def counted(self: Any, rows: Any, *args: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        return answers(self, rows, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "answers", counted)
        yield calls
