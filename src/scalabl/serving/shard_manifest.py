"""The output directory of a sharded prediction, and its manifest: what its answers are answers to.

OUTPUT/manifest.json      the adapter, the settings, every shard with its SHA-256, and what was chosen for all of them
OUTPUT/NAME.jsonl         (or .parquet) the answers of the shard NAME, in the order of its rows
OUTPUT/.work/             answers to rows of shards that are not done, and Ray Data's checkpoints; gone in the end

A call with another adapter or other settings is refused. A shard whose content has changed loses its answers, and they
are made anew; what was chosen stands, so that all shards are answered alike. Imports no torch and no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from scalabl.core import __version__
from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.files import read_json, require_place, sha256, write_json, writing
from scalabl.core.locations import Location, StorePath, for_arrow
from scalabl.inference.settings import PredictionSettings, is_answered
from scalabl.serving.shards import Block, Shard, ShardSource, examine, searched

MANIFEST = "manifest.json"
WORK = ".work"
_OTHER = "choose another --output or delete it"


@dataclass(frozen=True)
class Receipt:
    """What a file of answers has in it.

    Attributes:
        rows: how many answers.
        answered: how many of them are not null.
        particles: over how many particles they are averaged, all rows together; None where that is not counted.
    """

    rows: int
    answered: int
    particles: int | None


@dataclass
class ShardManifest:
    """What an output directory's answers are answers to.

    Attributes:
        adapter: what identifies it.
        settings: everything else that decides the answers.
        shards: by name.
        resolved: the settings with what was chosen once for all rows; None before.
        weight_bytes: the size of the model, by which workers are counted.
        device: "GPU" or "CPU", which give answers of different precision; None before.
        receipts: by shard, of those that are done.
    """

    adapter: dict[str, Any]
    settings: dict[str, Any]
    shards: dict[str, Shard] = field(default_factory=dict)
    resolved: PredictionSettings | None = None
    weight_bytes: int = 0
    device: str | None = None
    receipts: dict[str, Receipt] = field(default_factory=dict)

    def begin(self, output: Location, format: str, shards: dict[str, Shard], open_shards: Set[str]) -> None:
        """Take away the answers of shards that have changed, then note what the shards are now."""
        for name in open_shards:
            answers_path(output, name, format).unlink(missing_ok=True)
            self.receipts.pop(name, None)
        self.shards = shards
        self.write(output)

    def write(self, output: Location) -> None:
        """Write it into the output directory."""
        write_json(
            output / MANIFEST,
            {
                "scalabl": __version__,
                "adapter": self.adapter,
                "settings": self.settings,
                "device": self.device,
                "resolved": None if self.resolved is None else self.resolved.to_dict(),
                "weight_bytes": self.weight_bytes,
                "shards": [asdict(shard) for shard in self.shards.values()],
                "receipts": {name: asdict(receipt) for name, receipt in self.receipts.items()},
            },
        )


def answers_path(output: Location, name: str, format: str) -> Location:
    """The file of a shard's answers."""
    return output / f"{name}.{format}"


def open_output(
    output: Location, wanted: ShardManifest, given: str | Path | StorePath, sources: Sequence[ShardSource]
) -> ShardManifest:
    """The manifest of an output directory, or a new one where nothing was begun; nothing is written.

    Args:
        output: the directory.
        wanted: adapter and settings of this call.
        given: what the shards were found by.
        sources: the shards.

    Raises:
        UserError: the directory cannot be written, holds other files or the answers of another adapter or of other
            settings, or lies among the shards.
    """
    if _lies_in(output, root := searched(given)):
        raise UserError(f"{output} lies in {root}, where its answers would be taken for shards; {_OTHER}.")
    require_place(output, named=output)
    if not (output / MANIFEST).exists():
        if output.is_dir() and any(path.name != WORK for path in output.iterdir()):
            raise UserError(f"{output} is not empty and holds no {MANIFEST}; choose another --output.")
        return wanted
    made = _read(output)
    if made.adapter != wanted.adapter:
        raise UserError(f"{output} holds answers of another adapter or of one that has changed since; {_OTHER}.")
    for name, value in wanted.settings.items():
        if made.settings.get(name) != value:
            raise UserError(
                f"{output} holds answers with other settings ({name} was {made.settings.get(name)}, now {value}); "
                f"{_OTHER}."
            )
    gone = made.shards.keys() - {source.name for source in sources}
    if gone:
        raise UserError(f"{output} has answers to {min(gone)}, which {given} has no longer; restore it, or {_OTHER}.")
    return made


def _lies_in(location: Location, root: Location | None) -> bool:
    if isinstance(location, StorePath):
        return isinstance(root, StorePath) and location.is_relative_to(root)
    return isinstance(root, Path) and location.is_relative_to(root)


def require_device(manifest: ShardManifest, output: Location, device: str) -> None:
    """Note the device, or refuse another than the one that the answers so far come from.

    Raises:
        UserError: it is another.
    """
    if manifest.device not in (None, device):
        raise UserError(
            f"{output} holds answers made on a {manifest.device}, and this cluster would go on with a {device}, whose "
            f"precision differs; use a cluster like the first, or {_OTHER}."
        )
    manifest.device = device


def survey(
    output: Location,
    format: str,
    manifest: ShardManifest,
    sources: Sequence[ShardSource],
    labels: Sequence[str] | None,
    block_rows: int,
) -> tuple[dict[str, Shard], list[Block]]:
    """The shards as they are now, by name, and the blocks of those that are not done.

    Every shard is hashed, and read from end to end unless it is done. Answers that a killed call did not count are
    counted.

    Raises:
        UserError: a bad row, named by file and line; a file that is empty, truncated or of another kind; a file of
            answers that is not what was written, or that a stranger wrote.
    """
    shards: dict[str, Shard] = {}
    blocks: list[Block] = []
    index = max((shard.index for shard in manifest.shards.values()), default=-1) + 1
    with progress_bar() as progress:
        files = progress.add_task("reading shards", total=len(sources), detail="")
        for source in sources:
            progress.update(files, detail=source.name)
            stamp, digest, known = source.stamp(), sha256(source.path), manifest.shards.get(source.name)
            path = answers_path(output, source.name, format)
            if known is None and path.exists():
                raise UserError(f"{path} was not written by this command; move it away.")
            if known is not None and known.sha256 == digest and path.is_file():
                if source.name not in manifest.receipts:
                    manifest.receipts[source.name] = count(path, format, known.rows)
            else:
                if known is None or known.sha256 != digest:
                    known, index = Shard(source.name, digest, 0, index), index + 1
                found = examine(source, stamp, labels, known.index, block_rows)
                known = replace(known, rows=sum(block.rows for block in found))
                blocks += found
            shards[source.name] = known
            progress.advance(files)
    return shards, blocks


def write_answers(answers: Sequence[str], path: Location, format: str) -> Receipt:
    """Write the answers of a shard, given as JSON, into a file that appears whole or not at all."""
    made = [json.loads(answer) for answer in answers]
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as unfinished:
        if format == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            types = {
                "id": pa.string(), "text": pa.string(), "label": pa.string(), "labels": pa.list_(pa.string()),
                "guess": pa.list_(pa.string()) if "labels" in made[0] else pa.string(),
                "probs": pa.map_(pa.string(), pa.float64()), "set": pa.list_(pa.string()), "reason": pa.string(),
                "particles": pa.int64(), "predictive": pa.string(), "truncated": pa.bool_(),
            }  # fmt: skip
            names = dict.fromkeys(name for answer in made for name in answer)  # not every row is truncated
            schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
            rows = [answer | {"probs": [*answer["probs"].items()]} for answer in made]
            pq.write_table(pa.Table.from_pylist(rows, schema), unfinished)
        else:
            unfinished.write_text("".join(f"{answer}\n" for answer in answers), encoding="utf-8")
    return _receipt_of(made)


_COUNTED = ("label", "labels", "particles")  # what a receipt is made of


def count(path: Location, format: str, rows: int) -> Receipt:
    """The receipt of a shard's answers.

    Args:
        path: the file.
        format: "jsonl" or "parquet".
        rows: how many it must have.

    Raises:
        UserError: it has other rows, or cannot be read.
    """
    try:
        if format == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetFile(for_arrow(path)) as file:
                names = [name for name in _COUNTED if name in file.schema_arrow.names]
                found = file.read(columns=names).to_pylist()
        else:
            with path.open(encoding="utf-8") as lines:
                found = [{n: row[n] for n in _COUNTED if n in row} for row in map(json.loads, lines)]
    except UserError:  # of a store
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"{path} is no longer what was written; delete it and run the same command again.") from error
    if len(found) != rows:
        raise UserError(
            f"{path} has {len(found):,} answers for {rows:,} rows; delete it and run the same command again."
        )
    return _receipt_of(found)


def _receipt_of(answers: Sequence[Mapping[str, Any]]) -> Receipt:
    """The receipt of answers, at least one."""
    adaptive = answers[0].get("particles") is not None
    particles = sum(answer["particles"] for answer in answers) if adaptive else None
    return Receipt(len(answers), sum(map(is_answered, answers)), particles)


def _read(output: Location) -> ShardManifest:
    mend = _OTHER
    missing = f"{output / MANIFEST} is no file; {mend}."
    made = read_json(
        output / MANIFEST, missing=missing, mend=mend, expected=f"a manifest of answers; {mend}", key="shards"
    )
    try:
        if "resolved" in made:
            resolved, weight_bytes = made["resolved"], int(made["weight_bytes"])
        else:
            resolved, weight_bytes = _resolved_before(made)
        shards = [
            Shard(shard["name"], shard["sha256"], shard["rows"], shard.get("index", i))
            for i, shard in enumerate(made["shards"])
        ]
        return ShardManifest(
            adapter=made["adapter"],
            settings=made["settings"],
            shards={shard.name: shard for shard in shards},
            resolved=None if resolved is None else PredictionSettings.from_dict(resolved),
            weight_bytes=weight_bytes,
            device=made["device"],
            receipts={name: Receipt(**receipt) for name, receipt in made["receipts"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{output / MANIFEST} is no manifest of answers; {mend}.") from error


def _resolved_before(made: dict[str, Any]) -> tuple[dict[str, Any] | None, int]:
    """The resolved settings and the weights' size in a manifest that keeps the choices alone, as "decision"."""
    chosen = made["decision"]
    if chosen is None:
        return None, 0
    settings = {name: value for name, value in made["settings"].items() if name != "format"}
    choices = {name: chosen[name] for name in ("predictive", "stochastic_layers", "why", "threshold")}
    return settings | choices | {"chosen": chosen["name"]}, int(chosen["weight_bytes"])
