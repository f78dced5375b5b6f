"""What the covariance study is made of: three runs of one task, their rows, and what was computed of them before."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data import Example, load_task
from scalabl.data.load import rows_of, with_labels
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import Settings
from scalabl.scoring import Encoded
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.training.run import select_rows

RUNS = {"mle": "plain LoRA", "diagonal": "ScalaBL, diagonal", "full": "ScalaBL, full"}
Made = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what JSON holds


@dataclass(frozen=True, eq=False)
class Study:
    """Attributes:
    directories: of the finished runs "mle", "diagonal" and "full".
    records: what their `scalabl.json` say.
    train: training rows that curvature and gradients are taken over, the first of them for the latter.
    test, shifted: rows to predict; of the runs' own task, and of another one.
    options: of the command line.
    """

    directories: dict[str, Path]
    records: dict[str, RunRecord]
    train: list[Example]
    test: list[Example]
    shifted: list[Example]
    options: argparse.Namespace

    def recipe(self, name: str) -> Settings:
        return self.records[name].settings

    def run(self, name: str) -> Run:
        """The loaded run; one is held at a time."""
        return loaded(self.directories[name], self.options.model)

    def encoded(self, run: Run, rows: Sequence[Example]) -> list[Encoded]:
        """Rows as tokens with the frozen layers' output."""
        return with_stored_trunk(run.scorer, run.encode(list(rows)), batch_size=self.options.batch_size)

    def kept(self, name: str, made_from: Sequence[Any], make: Callable[[], Made]) -> Made:
        """What `make` gives, computed once for what it is made from."""
        digest = hashlib.sha256(json.dumps(list(made_from)).encode()).hexdigest()[:12]
        path: Path = self.options.work / f"{name}-{digest}.safetensors"
        if not path.is_file():
            tensors, facts = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
                save_file(contiguous, unfinished, metadata={"facts": json.dumps(facts)})
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        # read back even where it was just made: a second start works on the very same numbers
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["facts"])

    def identity(self, name: str, *rows: Sequence[Example]) -> list[Any]:
        """A run and rows, for `kept`."""
        return [self.records[name].adapter_sha256, [[[r.question, r.choices, r.answer] for r in x] for x in rows]]


@lru_cache(maxsize=1)
def loaded(directory: Path, model: str | None) -> Run:
    """A finished run; the last one is held."""
    return load_run(directory, model=model)


def study_of(options: argparse.Namespace) -> Study:
    """The study that the options ask for, checked before anything is loaded.

    Raises:
        UserError: a run is not finished, of another kind than its place, or of another task or base model.
    """
    directories = {name: getattr(options, name) for name in RUNS}
    records = {name: RunRecord.read_finished(directory) for name, directory in directories.items()}
    recipes = {name: record.recipe for name, record in records.items()}
    if recipes["mle"]["method"] not in ("mle", "map"):
        raise UserError(f"{options.mle} was trained by {recipes['mle']['method']}; give a run of plain LoRA as --mle.")
    for name in ("diagonal", "full"):
        recipe = recipes[name]
        if recipe["method"] != "scalabl" or recipe["covariance"] != name or records[name].joint_sha256:
            raise UserError(f"{directories[name]} is no run of scalabl train with covariance: {name}.")
        for setting in ("model", "data"):
            if recipe[setting] != recipes["mle"][setting]:
                raise UserError(
                    f"{directories[name]} has {setting} {recipe[setting]!r} and {options.mle} has "
                    f"{recipes['mle'][setting]!r}; the three runs must share it."
                )
    data, labels = recipes["mle"]["data"], records["mle"].labels
    recipe = records["mle"].settings
    limit = min(options.train_rows, records["mle"].rows["train"])
    train = with_labels(select_rows(load_task(data), recipe.changed(train_rows=limit).rows).train, labels, data)
    return Study(
        directories,
        records,
        train,
        rows_of(data, limit=options.test_rows, labels=labels),
        rows_of(options.ood, limit=options.ood_rows),
        options,
    )
