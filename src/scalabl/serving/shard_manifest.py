"""The output directory of a sharded prediction, and its manifest: what its answers are answers to.

OUTPUT/manifest.json      the adapter, the settings, every shard with its SHA-256, and what was decided for all of them
OUTPUT/NAME.jsonl         (or .parquet) the answers of the shard NAME, in the order of its rows
OUTPUT/.work/             blocks that are done of shards that are not; gone in the end

A call with another adapter or other settings is refused. A shard whose content has changed loses its answers, and they
are made anew; the decision stands, so that all shards are answered alike. Imports no torch and no Ray.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalabl.core import __version__
from scalabl.core.errors import UserError
from scalabl.core.files import read_json, write_json
from scalabl.inference.answering import Decision
from scalabl.serving.shard_answers import Receipt
from scalabl.serving.shards import Shard, ShardSource, searched

MANIFEST = "manifest.json"
WORK = ".work"
_OTHER = "choose another --output or delete it"


@dataclass
class ShardManifest:
    """What an output directory's answers are answers to.

    Attributes:
        adapter: what identifies it.
        settings: everything else that decides the answers.
        shards: by name.
        decision: what was decided once for all rows; None before.
        device: "GPU" or "CPU", which give answers of different precision; None before.
        receipts: by shard, of those that are done.
    """

    adapter: dict[str, Any]
    settings: dict[str, Any]
    shards: dict[str, Shard] = field(default_factory=dict)
    decision: dict[str, Any] | None = None
    device: str | None = None
    receipts: dict[str, Receipt] = field(default_factory=dict)

    def write(self, output: Path) -> None:
        """Write it into the output directory."""
        write_json(
            output / MANIFEST,
            {
                "scalabl": __version__,
                "adapter": self.adapter,
                "settings": self.settings,
                "device": self.device,
                "decision": self.decision,
                "shards": [shard.as_dict() for shard in self.shards.values()],
                "receipts": {name: receipt.as_dict() for name, receipt in self.receipts.items()},
            },
        )


def decision_in(noted: dict[str, Any]) -> Decision:
    """The decision that a manifest keeps beside the size of the model's weights."""
    return Decision.from_dict({name: value for name, value in noted.items() if name != "weight_bytes"})


def answers_path(output: Path, name: str, format: str) -> Path:
    """The file of a shard's answers."""
    return output / f"{name}.{format}"


def block_path(output: Path, shard: Shard, index: int, format: str) -> Path:
    """The file of a block's answers; a shard whose content has changed, or that is cut otherwise, has others."""
    identity = hashlib.sha256(f"{shard.sha256} {shard.block_rows} {shard.name}".encode()).hexdigest()[:16]
    return output / WORK / identity / f"{index:06d}.{format}"


def open_output(output: Path, wanted: ShardManifest, given: Path, sources: Sequence[ShardSource]) -> ShardManifest:
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
    where = Path(os.path.abspath(output))
    root = searched(given)
    if root is not None and where.is_relative_to(root):
        raise UserError(f"{output} lies in {root}, where its answers would be taken for shards; {_OTHER}.")
    _require_writable(where, output)
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


def require_device(manifest: ShardManifest, output: Path, device: str) -> None:
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


def _read(output: Path) -> ShardManifest:
    mend = _OTHER
    missing = f"{output / MANIFEST} is no file; {mend}."
    made = read_json(
        output / MANIFEST, missing=missing, mend=mend, holds=f"a manifest of answers; {mend}", key="shards"
    )
    try:
        if made["decision"] is not None:
            decision_in(made["decision"])
            int(made["decision"]["weight_bytes"])
        shards = [Shard.from_dict(shard) for shard in made["shards"]]
        return ShardManifest(
            adapter=made["adapter"],
            settings=made["settings"],
            shards={shard.name: shard for shard in shards},
            decision=made["decision"],
            device=made["device"],
            receipts={name: Receipt(**receipt) for name, receipt in made["receipts"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{output / MANIFEST} is no manifest of answers; {mend}.") from error


def _require_writable(where: Path, output: Path) -> None:
    """Refuse a directory that could not be written or made, by a probe in it or in what there is of its parents."""
    while not where.exists():
        where = where.parent
    probe = where / f".{os.getpid()}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another --output.") from error
