"""A predictor in a Ray worker's process: loaded once, then it answers block after block."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray import get_runtime_context

from scalabl.core.console import quiet, quiet_imports
from scalabl.core.errors import UserError, first_line
from scalabl.core.files import read_if_whole, write_text
from scalabl.core.locations import Location
from scalabl.data.example import Example
from scalabl.inference.settings import PredictionSettings
from scalabl.serving.shards import NamedRow, place_of

if TYPE_CHECKING:
    from scalabl.inference.predictor import Predictor

ATTEMPTS = 3  # deaths at one block, after which it is named
BEGUN = "begun"  # in the directory of work: how often what is under way was begun


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know; all paths are absolute, or of a store.

    Attributes:
        cwd: of the driver; a run's record may name its data and its base model from there.
        directory: of the run.
        work: the directory of what only serves to go on.
        model: the base model, if it has moved.
        settings: what decides the answers.
        batch_size: rows at a time.
        files: of the shards, by their indices.
    """

    cwd: str
    directory: Path
    work: Location
    model: str | None
    settings: PredictionSettings
    batch_size: int
    files: dict[int, Location]

    def where(self, key: int) -> str:
        """ "file:line" of a row."""
        shard, number = place_of(key)
        return f"{self.files[shard]}:{number}"


class Worker:
    """A predictor in a process of its own. The model is loaded with the first block, whose refusals Ray hands on."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.predictor: Predictor | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """key, shard and answer (JSON) of every row; a row that cannot be encoded has -key and the reason.

        Raises:
            UserError: the model cannot be loaded, or this block has cost too many workers their life.
        """
        if self.predictor is None:
            with self._counted(f"model-{get_runtime_context().get_actor_id()}", "loading the model"):
                self.predictor = load(self.setup)
        keys = batch["key"].to_pylist()
        title = f"the {len(keys):,} rows from {self.setup.where(keys[0])} on"
        with self._counted(str(keys[0]), title):
            made = self._answers(self.predictor, keys, [_example(row) for row in batch.to_pylist()])
        return pa.table(
            {
                "key": pa.array([key for key, _ in made], pa.int64()),
                "shard": pa.array([place_of(abs(key))[0] for key, _ in made], pa.int32()),
                "answer": pa.array([answer for _, answer in made], pa.string()),
            }
        )

    def _answers(self, predictor: Predictor, keys: list[int], rows: list[Example]) -> list[tuple[int, str]]:
        made, encoded, good = [], [], []
        for key, row in zip(keys, rows, strict=True):
            try:
                encoded += predictor.run.encode([row])
                good.append((key, row))
            except UserError as error:
                made.append((-key, f"{self.setup.where(key)}: {error}"))
        if good:
            answers = predictor.answers([row for _, row in good], encoded)
            pairs = zip(good, answers, strict=True)
            made += [(key, json.dumps(answer, ensure_ascii=False)) for (key, _), answer in pairs]
        return made

    @contextlib.contextmanager
    def _counted(self, name: str, title: str) -> Iterator[None]:
        """Refuse what workers have begun before and did not survive, instead of repeating it for ever."""
        note = self.setup.work / BEGUN / name
        count = read_if_whole(note)  # a number, or damaged
        begun = count if isinstance(count, int) else 0
        if begun >= ATTEMPTS:
            raise deadly(title)
        note.parent.mkdir(exist_ok=True)
        write_text(note, str(begun + 1))
        yield
        note.unlink()


def _example(row: dict[str, Any]) -> Example:
    choices, images = tuple(row["choices"]), tuple(row["images"])
    return Example(row["id"], row["question"], choices, None, images, row["pair"], rendered=row["rendered"])


def load(setup: Setup) -> Predictor:
    """The predictor, in a process that has loaded nothing yet.

    Raises:
        UserError: the run, its base model or the output are not to be had on this machine.
    """
    quiet_imports()
    from scalabl.inference.predictor import Predictor

    quiet()
    with contextlib.suppress(OSError):
        os.chdir(setup.cwd)
    if not setup.work.is_dir():
        raise UserError(f"A machine of the cluster does not see {setup.work.parent}; give a shared directory.")
    return Predictor.load(setup.directory, setup.settings, model=setup.model, batch_size=setup.batch_size)


def resolve(setup: Setup, rows: list[NamedRow]) -> tuple[PredictionSettings, int]:
    """The settings resolved for these rows, and the bytes of the model's weights.

    Raises:
        UserError: a row that the run cannot encode, named by shard and row, or held-out rows that cannot be had.
    """
    predictor = load(setup)
    for where, row in rows:
        try:
            predictor.run.encode([row])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    settings = predictor.resolve([row for _, row in rows])
    return settings, sum(p.numel() * p.element_size() for p in predictor.run.scorer.model.parameters())


def refusal(error: Exception) -> Exception:
    """What a worker refused, or a sentence for a worker that has another program, or the error itself."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return UserError(first_line(cause))  # Ray Data puts lines of its own behind
    reason = str(error).strip().splitlines()[-1]
    if isinstance(cause, ModuleNotFoundError) or "No module named" in reason:
        return UserError(f"Workers cannot start ({reason}); install the same scalabl on every machine.")
    return error


def deadly(title: str) -> UserError:
    """What a worker was at when it died once too often."""
    return UserError(
        f"{ATTEMPTS} workers died at {title}, perhaps out of memory; lower --batch-size, and run the same command "
        "again to go on."
    )
