"""What is done of a sharded prediction and what is to do, told by its files alone. Imports no torch and no Ray."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.core.files import sha256
from scalabl.core.progress import progress_bar
from scalabl.serving.shard_answers import receipt_of
from scalabl.serving.shard_manifest import WORK, ShardManifest, answers_path, block_path
from scalabl.serving.shards import Block, Shard, ShardSource, blocks_of, examine


@dataclass
class Work:
    """The shards of a call, and what its output directory has of them.

    Attributes:
        output: the directory, absolute.
        format: of the answers.
        manifest: of the output, as the calls before left it until `begin`.
        sources: by name.
        shards: as they are now.
        stamps: what their files looked like before they were read.
    """

    output: Path
    format: str
    manifest: ShardManifest
    sources: dict[str, ShardSource]
    shards: dict[str, Shard]
    stamps: dict[str, tuple[int, int]]

    @classmethod
    def found(
        cls,
        output: Path,
        format: str,
        manifest: ShardManifest,
        sources: Sequence[ShardSource],
        labels: Sequence[str] | None,
        block_rows: int,
    ) -> Work:
        """Hash every shard, and read it from end to end unless the manifest knows it.

        Raises:
            UserError: a bad row, named by file and line, or a file that is empty, truncated or of another kind.
        """
        shards: dict[str, Shard] = {}
        stamps: dict[str, tuple[int, int]] = {}
        with progress_bar() as progress:
            files = progress.add_task("reading shards", total=len(sources), detail="")
            for source in sources:
                stamps[source.name] = source.stamp()
                digest, known = sha256(Path(source.path)), manifest.shards.get(source.name)
                if known is None or (known.sha256, known.block_rows) != (digest, block_rows):
                    progress.update(files, detail=source.name)
                    known = examine(source, digest, labels, block_rows)
                shards[source.name] = known
                progress.advance(files)
        return cls(output, format, manifest, {source.name: source for source in sources}, shards, stamps)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards.values())

    def answers(self, name: str) -> Path:
        """The file of a shard's answers."""
        return answers_path(self.output, name, self.format)

    def block(self, name: str, index: int) -> Path:
        """The file of a block's answers."""
        return block_path(self.output, self.shards[name], index, self.format)

    def blocks(self, name: str) -> list[Block]:
        """All blocks of a shard, in order."""
        return blocks_of(self.sources[name], self.shards[name], self.stamps[name])

    def open_blocks(self, name: str) -> list[Block]:
        """Those that are not done."""
        return [block for block in self.blocks(name) if not self.block(name, block.index).is_file()]

    def open_shards(self) -> list[str]:
        """The shards that are not done, or not as they are now; answers that a killed call did not count are counted.

        Raises:
            UserError: a file of answers that is not what was written, or that a stranger wrote.
        """
        found = []
        for name, shard in self.shards.items():
            before, path = self.manifest.shards.get(name), self.answers(name)
            if before is None and path.exists():
                raise UserError(f"{path} was not written by this command; move it away.")
            if before is None or before.sha256 != shard.sha256 or not path.is_file():
                found.append(name)
            elif name not in self.manifest.receipts:
                self.manifest.receipts[name] = receipt_of(path, self.format, shard.rows)
        return found

    def begin(self, open_shards: Sequence[str]) -> None:
        """Take away the answers of shards that have changed, then note what the shards are now."""
        for name in open_shards:
            self.answers(name).unlink(missing_ok=True)
            self.manifest.receipts.pop(name, None)
        self.manifest.shards = self.shards
        self.manifest.write(self.output)

    def end(self) -> None:
        """Nothing is left to do: take away what only served to go on."""
        shutil.rmtree(self.output / WORK, ignore_errors=True)
