"""Answers to shards of rows by a Ray cluster whose machines share the files.

Why plain actors and not Ray Data's `map_batches`: what has to exist exactly once is a file of answers for a file of
rows. Ray Data cuts and joins rows as its memory asks, names what it writes after its own tasks, repeats a task whose
worker died for ever, and begins anew when the driver was killed. Here the unit is a block of one shard: a worker reads
it, answers it, and puts its file in place (`shard_answers`), so that doing it again changes nothing, and a file
that is there is a block that is done.

What has to be the same for all rows (the predictive that auto takes, the threshold that keeps a promise) is decided
once, before, at the driver's call but by the first worker: that stands where the answers are made, while the driver may
have no accelerator and no room for the model. The manifest keeps it for calls that go on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scalabl.core.errors import UserError
from scalabl.core.progress import progress_bar
from scalabl.inference.answering import Asked, Decision
from scalabl.runs.record import RunRecord
from scalabl.serving.ray_address import connected, gpus_each
from scalabl.serving.ray_pool import Job, Pool
from scalabl.serving.ray_worker import Setup, Worker
from scalabl.serving.shard_answers import FORMATS, Receipt
from scalabl.serving.shard_manifest import WORK, ShardManifest, decision_in, open_output, require_device
from scalabl.serving.shard_work import Work
from scalabl.serving.shards import Block, NamedRow, find_sources, first_rows

BLOCK_ROWS = 512
FIRST = 1000  # rows on which auto's choice is made
_WORK_MEMORY = 1.5  # times the model's weights, what a worker on a CPU is given

Tell = Callable[[Decision], None]


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
    given: Path,
    output: Path,
    address: str,
    asked: Asked,
    *,
    format: str | None = None,
    batch_size: int = 8,
    block_rows: int = BLOCK_ROWS,
    model: str | None = None,
    tell: Tell | None = None,
    report: Callable[[int], None] | None = None,
) -> Summary:
    """Answer every shard into a file of its own; the same call goes on after any kill.

    Args:
        directory: a finished run, at the same path on every machine, as are the shards and the output.
        given: a file, a directory of shards, or a glob pattern.
        output: a directory; the answers to the shard a/b.jsonl are a/b.jsonl in it.
        address: of the cluster, "auto", or "local".
        asked: what decides the answers.
        format: "jsonl" or "parquet"; None is that of the shards.
        batch_size: rows at a time.
        block_rows: rows of a block, what the death of a worker costs.
        model: the base model, if it has moved.
        tell: called with the decision before rows are answered.
        report: called with the number of rows of every block that is done.

    Raises:
        UserError: bad shards, an output directory that cannot be written or holds other answers, no such cluster; and
            rows that could not be answered, when all others are.
    """
    if format not in (None, *FORMATS):
        raise UserError(f"The format is {format!r}; it must be {' or '.join(FORMATS)}.")
    if block_rows < 1:
        raise UserError(f"A block of {block_rows} rows is none; it must be at least 1.")
    record = RunRecord.read_classifier(directory)
    labels = record.labels
    sources = find_sources(given)
    format = format or sources[0].format
    output = Path(os.path.abspath(output))
    manifest = open_output(
        output, ShardManifest(_adapter_of(record), asked.as_dict() | {"format": format}), given, sources
    )
    work = Work.found(output, format, manifest, sources, labels, block_rows)
    if work.open_shards():
        setup = Setup(os.getcwd(), directory.resolve(), output, _absolute(model), asked, labels, format, batch_size)
        with connected(address) as ray:
            require_device(manifest, output, "GPU" if gpus_each(ray) else "CPU")
            with _alone(output, manifest):
                rows = first_rows(sources, labels, FIRST) if manifest.decision is None else []
                _run(ray, work, setup, rows, tell, report)
                work.end()
    elif tell is not None and manifest.decision is not None:
        tell(_decision(manifest))
    receipts = manifest.receipts.values()
    total = sum(receipt.rows for receipt in receipts)
    particles = sum(receipt.particles or 0 for receipt in receipts) / total if asked.adaptive else None
    return Summary(len(receipts), total, sum(receipt.answered for receipt in receipts), particles)


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


def _decision(manifest: ShardManifest) -> Decision:
    assert manifest.decision is not None
    return decision_in(manifest.decision)


@contextlib.contextmanager
def _alone(output: Path, manifest: ShardManifest) -> Iterator[None]:
    """Keep a second call out, which would do no harm but the work twice; leave nothing where nothing was decided."""
    made = not output.exists()
    (output / WORK).mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / WORK / "lock", timeout=0):
            try:
                yield
            except BaseException:
                if manifest.decision is None:
                    shutil.rmtree(output if made else output / WORK, ignore_errors=True)
                raise
    except Timeout:
        raise UserError(f"Another call writes into {output}; wait for its end, or choose another --output.") from None


def _run(
    ray: Any,
    work: Work,
    setup: Setup,
    first: list[NamedRow],
    tell: Tell | None,
    report: Callable[[int], None] | None,
) -> None:
    """Decide if nothing was decided, answer the open blocks, and put together the shards whose blocks are all done."""
    gpus, manifest = gpus_each(ray), work.manifest
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")(Worker)
    pool = Pool(ray, lambda: actor.remote(setup, None if manifest.decision is None else _decision(manifest).as_dict()))
    failed: dict[str, UserError] = {}
    with contextlib.closing(pool), progress_bar() as progress:
        bar = progress.add_task("predicting", total=work.rows, detail="loading the model")
        if manifest.decision is None:
            ((_, decided),) = pool.do(deque([Job("decide", first, ("decide",), "the first rows")]), 1)
            if isinstance(decided, UserError):
                raise decided
            manifest.decision = decided
        if tell is not None:
            tell(_decision(manifest))
        assert manifest.decision is not None
        open_shards = work.open_shards()
        work.begin(open_shards)
        left = {name: work.open_blocks(name) for name in open_shards}
        counts = {name: len(blocks) for name, blocks in left.items()}
        jobs = deque(_answering(work, block) for blocks in left.values() for block in blocks)
        jobs.extend(_joining(work, name) for name, blocks in left.items() if not blocks)
        progress.update(bar, completed=work.rows - sum(block.rows for blocks in left.values() for block in blocks))
        try:
            for job, result in pool.do(jobs, _workers(ray, gpus, manifest.decision["weight_bytes"])):
                name = job.key[1]
                if isinstance(result, UserError):
                    failed.setdefault(name, result)
                elif job.method == "join":
                    manifest.receipts[name] = Receipt(**result)
                else:
                    counts[name] -= 1
                    progress.advance(bar, result)
                    if counts[name] == 0:
                        jobs.appendleft(_joining(work, name))
                    if report is not None:
                        report(result)
                progress.update(bar, detail=f"{pool.working} at work" + f", {pool.lost} lost" * bool(pool.lost))
        finally:
            manifest.write(work.output)  # with the receipts of what is done
    if failed:
        others = f" {len(failed) - 1} more shards have such rows." if len(failed) > 1 else ""
        raise UserError(f"{failed[min(failed)]}{others} All else is done; mend it and run the same command again.")


def _answering(work: Work, block: Block) -> Job:
    name, where = block.source.name, f"{block.source.path}:{block.start[1]}"
    title = f"the {block.rows:,} rows from {where} on"
    return Job("answer", (block, work.block(name, block.index)), ("answer", name, block.index), title)


def _joining(work: Work, name: str) -> Job:
    parts = [work.block(name, block.index) for block in work.blocks(name)]
    return Job("join", (parts, work.answers(name), work.shards[name].rows), ("join", name), f"the answers to {name}")


def _workers(ray: Any, gpus: int, weight_bytes: int) -> int:
    """One for each GPU; without any one for each core, as far as the cluster's memory holds the model so often."""
    resources = ray.cluster_resources()
    if gpus:
        return max(1, int(resources["GPU"]))
    fit = resources.get("memory", float("inf")) / (_WORK_MEMORY * max(weight_bytes, 1))
    return max(1, int(min(resources.get("CPU", 1), fit)))
