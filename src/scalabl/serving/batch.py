"""Answers to shards of rows by Ray Data; the same call goes on after any kill.

    blocks of rows -> map_batches over a pool of predictors -> parts (Parquet) -> one file of answers a shard

A block is a read task of a Ray Data source (`ShardRows`), so that rows keep the sentences of this package's own reader,
their lines and their default ids. A part is its own mark: Parquet is whole or has no end, so that the next call takes
away the halves that a kill has left, and answers the rows whose keys are in no part. A row that cannot be answered
leaves its sentence under its negative key, which counts as not done. In the end the parts of a shard are put together
in the order of its rows, each row once.

Three things are not left to Ray Data (2.60). Its checkpoints are marks beside the parts that are renamed when a part is
written; a store copies and deletes instead, and a kill between the two leaves a mark of rows whose part is then taken
away. Its filter of rows that are done is a pool of actors, which take the processors that the predictors wait for (a
cluster of two cores stands still); here the driver leaves the rows out that are done. And it repeats what a dead worker
was at for ever; here workers count (`batch_worker`).

What has to be the same for all rows (the predictive that auto takes, the threshold that keeps a promise) is resolved
once, before, by a task: that stands where the answers are made, while the driver may have no accelerator and no room
for the model. The manifest keeps it for calls that go on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata
from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

from scalabl.core.errors import UserError
from scalabl.core.files import remove
from scalabl.core.locations import Location, StorePath, locate
from scalabl.inference.calibration import calibration_for
from scalabl.inference.settings import PredictionSettings
from scalabl.runs.record import RunRecord
from scalabl.runs.stock import read_classifier
from scalabl.serving.alone import alone
from scalabl.serving.batch_worker import ATTEMPTS, BEGUN, Setup, Worker, deadly, refusal, resolve
from scalabl.serving.parts import answers_in, done
from scalabl.serving.ray_address import connected, gpus_each
from scalabl.serving.shard_manifest import (
    WORK,
    ShardManifest,
    answers_path,
    open_output,
    require_device,
    survey,
    write_answers,
)
from scalabl.serving.shards import Block, NamedRow, ShardSource, find_sources, first_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    Keys = npt.NDArray[np.int64]

FORMATS = ("jsonl", "parquet")
BLOCK_ROWS = 512
FIRST = 1000  # rows on which auto's choice is made
_WORK_MEMORY = 1.5  # times the model's weights, what a worker on a CPU is given
_PARTS = "parts"  # in WORK
_CONTEXT = ("enable_progress_bars", "raise_original_map_exception")  # of Ray Data, put back


@dataclass(frozen=True)
class Summary:
    """What a prediction came to.

    Attributes:
        shards: how many.
        rows: how many answers.
        answered: how many of them are not null.
        particles: the mean over rows under adaptive N, else None.
    """

    shards: int
    rows: int
    answered: int
    particles: float | None


def predict_shards(
    directory: Path,
    given: str | Path,
    output: str | Path,
    address: str,
    settings: PredictionSettings,
    *,
    format: str | None = None,
    batch_size: int = 8,
    block_rows: int = BLOCK_ROWS,
    model: str | None = None,
    tell: Callable[[PredictionSettings], None] | None = None,
) -> Summary:
    """Answer every shard into a file of its own; the same call goes on after any kill.

    Args:
        directory: a finished run, or another trainer's adapter with a classification head, at the same path on every
            machine, as are the shards and the output that are paths.
        given: a file, a directory of shards, or a glob pattern; a path, or an address such as s3://bucket/rows.
        output: a directory, likewise; the answers to the shard a/b.jsonl are a/b.jsonl in it.
        address: of the cluster, "auto", or "local".
        settings: what decides the answers.
        format: "jsonl" or "parquet"; None is that of the shards.
        batch_size: rows at a time.
        block_rows: rows of a block, what the death of a worker costs.
        model: the base model, if it has moved.
        tell: called with the resolved settings before rows are answered.

    Raises:
        UserError: bad shards, an output directory that cannot be written or holds other answers, no such cluster; and
            rows that could not be answered, when all others are.
    """
    if format not in (None, *FORMATS):
        raise UserError(f"The format is {format!r}; it must be {' or '.join(FORMATS)}.")
    if block_rows < 1:
        raise UserError(f"A block of {block_rows} rows is none; it must be at least 1.")
    record = read_classifier(directory, model=model)
    labels = record.labels
    sources = find_sources(given)
    format = format or sources[0].format
    target = locate(output)
    named = settings.to_dict() | {"predictive": settings.predictive or "auto", "format": format}
    calibration = {} if calibration_for(record, settings) is None else {"calibration": record.calibration}
    manifest = open_output(target, ShardManifest(_adapter_of(record) | calibration, named), given, sources)
    shards, blocks = survey(target, format, manifest, sources, labels, block_rows)
    if blocks:
        files = {shards[source.name].index: source.path for source in sources}
        work, model = target / WORK, _absolute(model)
        setup = Setup(os.getcwd(), directory.resolve(), work, model, settings, batch_size, files)
        with connected(address) as ray:
            gpus = gpus_each(ray)
            require_device(manifest, target, "GPU" if gpus else "CPU")
            with _alone(target, manifest):
                if manifest.resolved is None:
                    first = first_rows(sources, labels, FIRST)
                    manifest.resolved, manifest.weight_bytes = _resolve_remotely(ray, gpus, setup, first)
                if tell is not None:
                    tell(manifest.resolved)
                manifest.begin(target, format, shards, {block.source.name for block in blocks})
                workers = min(_workers(ray, gpus, manifest.weight_bytes), len(blocks))
                _answer(replace(setup, settings=manifest.resolved), blocks, labels, workers, gpus)
                _put_together(target, format, manifest, {block.shard: block.source for block in blocks})
    elif tell is not None and manifest.resolved is not None:
        tell(manifest.resolved)
    receipts = manifest.receipts.values()
    total = sum(receipt.rows for receipt in receipts)
    particles = sum(receipt.particles or 0 for receipt in receipts) / total if settings.is_adaptive else None
    return Summary(len(receipts), total, sum(receipt.answered for receipt in receipts), particles)


class ShardRows(Datasource):
    """Blocks as a source of Ray Data, a read task each: key, id, question, choices, images and pair of every row.

    Args:
        blocks: what to read.
        labels: the run's class words.
        done: sorted keys of rows to leave out.
    """

    def __init__(self, blocks: Sequence[Block], labels: Sequence[str] | None, done: Keys) -> None:
        super().__init__()
        self.tasks = []
        for block in blocks:
            lowest, highest = block.keys
            of_block = done[np.searchsorted(done, lowest) : np.searchsorted(done, highest, side="right")].tolist()
            if len(of_block) < block.rows:
                read = partial(_read, block, labels, frozenset(of_block))
                self.tasks.append(ReadTask(read, BlockMetadata(block.rows - len(of_block), None, None, None)))

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown, and small beside the model."""
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ReadTask]:
        """One a block, whatever parallelism is wished for."""
        return self.tasks


def _read(block: Block, labels: Sequence[str] | None, done: frozenset[int]) -> list[pa.Table]:
    rows = [(key, row) for key, row in block.read(labels) if key not in done]
    texts = pa.list_(pa.string())
    return [
        pa.table(
            {
                "key": pa.array([key for key, _ in rows], pa.int64()),
                "id": pa.array([row.id for _, row in rows], pa.string()),
                "question": pa.array([row.question for _, row in rows], pa.string()),
                "choices": pa.array([list(row.choices) for _, row in rows], texts),
                "images": pa.array([list(row.images) for _, row in rows], texts),
                "pair": pa.array([row.pair for _, row in rows], pa.string()),
                "rendered": pa.array([row.rendered for _, row in rows], pa.bool_()),
            }
        )
    ]


def _answer(setup: Setup, blocks: Sequence[Block], labels: Sequence[str] | None, workers: int, gpus: int) -> None:
    """Write the answers to all rows that have none into parts.

    Raises:
        UserError: the model cannot be loaded, a shard has changed, or workers die of some rows.
    """
    parts = setup.work / _PARTS
    remove(setup.work / BEGUN)
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in _CONTEXT}
    source = ShardRows(blocks, labels, done(parts))
    if not source.tasks:
        return
    workers = min(workers, len(source.tasks))
    few = max(1, workers // 8)  # reading and writing take next to nothing, and no core that a predictor waits for
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what ends the work is raised here, as a sentence
    try:
        context.enable_progress_bars = sys.stderr.isatty()
        context.raise_original_map_exception = True
        rows = read_datasource(source, override_num_blocks=len(source.tasks), num_cpus=0, concurrency=few)
        answers = rows.map_batches(
            Worker, fn_constructor_args=(setup,), batch_size=None, batch_format="pyarrow",
            compute=ActorPoolStrategy(size=workers), num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD",
        )  # fmt: skip
        store = parts if isinstance(parts, StorePath) else None
        answers.write_parquet(
            str(parts) if store is None else store.path, partition_cols=["shard"],
            ray_remote_args={"num_cpus": 0}, concurrency=few,
            filesystem=store and store.filesystem, try_create_dir=store is None or store.has_directories,
        )  # fmt: skip
    except Exception as error:
        raise refusal(error) from error
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _put_together(output: Location, format: str, manifest: ShardManifest, sources: Mapping[int, ShardSource]) -> None:
    """Make a file of answers of every open shard whose rows are all answered.

    Raises:
        UserError: rows that could not be answered, when all others are.
    """
    failed: list[str] = []
    for shard in manifest.shards.values():
        if shard.index not in sources:
            continue
        found = answers_in(output / WORK / _PARTS / f"shard={shard.index}")
        answers = [answer for key, answer in found.items() if key > 0]
        if len(answers) == shard.rows:
            manifest.receipts[shard.name] = write_answers(answers, answers_path(output, shard.name, format), format)
        else:
            reasons = (reason for key, reason in reversed(found.items()) if key < 0 and -key not in found)
            missing = f"{sources[shard.index].path} has {len(answers):,} answers for {shard.rows:,} rows."
            failed.append(next(reasons, missing))
    if failed:
        others = f" {len(failed) - 1} more shards have such rows." if len(failed) > 1 else ""
        raise UserError(f"{failed[0]}{others} All else is done; mend it and run the same command again.")
    remove(output / WORK)


def _resolve_remotely(ray: Any, gpus: int, setup: Setup, rows: list[NamedRow]) -> tuple[PredictionSettings, int]:
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=ATTEMPTS - 1)(resolve)
    try:
        settings, weight_bytes = ray.get(task.remote(setup, rows))
    except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
        raise deadly("the first rows") from error
    except Exception as error:
        raise refusal(error) from error
    return settings, weight_bytes


def _adapter_of(record: RunRecord) -> dict[str, Any]:
    """What identifies a run's answers beside the settings: its weights, how it scores and in which precision."""
    kept = ("adapter_sha256", "joint_sha256", "base_fingerprint", "scoring", "predictive")
    recipe = {name: record.recipe.get(name) for name in ("method", "dtype", "bits")}
    return {**{name: getattr(record, name) for name in kept}, "labels": record.task["labels"], **recipe}


def _absolute(model: str | None) -> str | None:
    """A base model's directory as every machine sees it; a name as it is."""
    if model is None or not os.path.isdir(os.path.expanduser(model)):
        return model
    return os.path.abspath(os.path.expanduser(model))


@contextlib.contextmanager
def _alone(output: Location, manifest: ShardManifest) -> Iterator[None]:
    """Keep a second call out, which would do the work twice; leave nothing where nothing was resolved."""
    made = not output.exists()
    (output / WORK).mkdir(parents=True, exist_ok=True)
    with alone(output / WORK):
        try:
            yield
        except BaseException:
            if manifest.resolved is None:
                remove(output if made else output / WORK)
            raise
        finally:
            if manifest.resolved is not None:
                manifest.write(output)  # with the receipts of what is done


def _workers(ray: Any, gpus: int, weight_bytes: int) -> int:
    """One for each GPU; without any one for each core, as far as the cluster's memory has the model so often."""
    resources = ray.cluster_resources()
    if gpus:
        return max(1, int(resources["GPU"]))
    fit = resources.get("memory", float("inf")) / (_WORK_MEMORY * max(weight_bytes, 1))
    return max(1, int(min(resources.get("CPU", 1), fit)))
