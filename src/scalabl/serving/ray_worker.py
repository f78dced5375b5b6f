"""A finished run in a Ray worker's process: loaded once, then it answers block after block."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalabl.core.errors import UserError
from scalabl.inference.answering import Answering, Asked, Decision, decide, promised
from scalabl.serving.shard_answers import join, receipt_of, write_answers
from scalabl.serving.shards import Block, NamedRow

if TYPE_CHECKING:
    from scalabl.scoring.base import Encoded


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know; all paths are absolute.

    Attributes:
        cwd: of the driver; a run's record may name its data and its base model from there.
        directory: of the run.
        output: of the answers.
        model: the base model, if it has moved.
        asked: what decides the answers.
        labels: the run's class words.
        format: of the answers.
        batch_size: rows at a time.
    """

    cwd: str
    directory: Path
    output: Path
    model: str | None
    asked: Asked
    labels: Sequence[str] | None
    format: str
    batch_size: int


class Worker:
    """The actor. Nothing is loaded before `ready`, whose errors Ray hands on as they are.

    Args:
        setup: where everything is.
        decision: as plain values; None where this worker is to decide.
    """

    def __init__(self, setup: Setup, decision: dict[str, Any] | None) -> None:
        self.setup = setup
        self.decision = None if decision is None else Decision.from_dict(decision)
        self.answering: Answering | None = None

    def ready(self) -> None:
        """Load the model.

        Raises:
            UserError: the run, its base model or the output are not to be had on this machine.
        """
        from scalabl.core.quiet import quiet, quiet_imports

        quiet_imports()
        from scalabl.runs.loading import load_run

        quiet()
        with contextlib.suppress(OSError):
            os.chdir(self.setup.cwd)
        if not self.setup.output.is_dir():
            raise UserError(f"A machine of the cluster does not see {self.setup.output}; give a shared directory.")
        self.run = load_run(self.setup.directory, model=self.setup.model)

    def decide(self, rows: list[NamedRow]) -> dict[str, Any]:
        """The decision made from these rows, and the bytes of the model's weights, as plain values.

        Raises:
            UserError: a row that the run cannot encode, named by shard and row, or held-out rows that cannot be had.
        """
        self._encode(rows)
        asked, batch_size = self.setup.asked, self.setup.batch_size
        decision = decide(self.run, asked, [row for _, row in rows], batch_size=batch_size)
        self.decision = promised(self.run, asked, decision, batch_size=batch_size)
        weights = sum(p.numel() * p.element_size() for p in self.run.scorer.model.parameters())
        return {**self.decision.as_dict(), "weight_bytes": weights}

    def answer(self, job: tuple[Block, Path]) -> int:
        """Answer a block into its file; how many rows it has.

        Raises:
            UserError: a row that the run cannot encode, named by shard and row, or a shard that has changed.
        """
        block, path = job
        if self.answering is None:
            assert self.decision is not None
            self.answering = Answering(self.run, self.setup.asked, self.decision)
        named = block.read(self.setup.labels)
        encoded, rows = self._encode(named), [row for _, row in named]
        answers = list(self.answering.answers(rows, encoded, batch_size=self.setup.batch_size))
        write_answers(answers, path, self.setup.format)
        return len(answers)

    def join(self, job: tuple[list[Path], Path, int]) -> dict[str, Any]:
        """Put the files of a shard's blocks together; the receipt as plain values.

        Raises:
            UserError: they have not the shard's rows.
        """
        parts, target, rows = job
        if not target.is_file():  # else a worker died behind it
            join(parts, target, self.setup.format)
        receipt = receipt_of(target, self.setup.format, rows)
        for part in parts:
            part.unlink(missing_ok=True)
        return receipt.as_dict()

    def _encode(self, rows: Sequence[NamedRow]) -> list[Encoded]:
        encoded = []
        for where, row in rows:
            try:
                encoded += self.run.encode([row])
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
        return encoded
