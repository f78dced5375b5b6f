"""The checkpoints of a run: which of them is whole, and what of a directory the program has made and may take away."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from scalabl.core.console import words_console
from scalabl.core.files import ADAPTER, read_if_whole, remove, sha256, write_json
from scalabl.runs.directory import saved_shapes
from scalabl.runs.record import RECORD, RunRecord

DIRECTORY = "checkpoints"
_NAME = re.compile(r"checkpoint-(\d+)")
_OF_ONE_MODEL = (ADAPTER, "optimizer.pt", "scheduler.pt")  # what Trainer writes of a model that is no shard
_DIGESTS = "sha256.json"


class Digests(TrainerCallback):
    """Keeps the SHA-256 of a checkpoint's files beside them: those that the main process writes of a model that is no
    shard."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and checkpoint.is_dir() and not _is_sharded(checkpoint):
            files = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != _DIGESTS]
            own = [path for path in files if not path.name.startswith("rng_state_")]
            write_json(checkpoint / _DIGESTS, {path.name: sha256(path) for path in own})


def note_digest(file: Path) -> None:
    """Note down what a file of a checkpoint is now, where that was noted down before."""
    digests = read_if_whole(file.parent / _DIGESTS)
    if isinstance(digests, dict) and file.name in digests:
        write_json(file.parent / _DIGESTS, digests | {file.name: sha256(file)})


def last_checkpoint(output: Path, *, tell: bool = True) -> Path | None:
    """The newest whole checkpoint of a run.

    Damaged ones (a kill or a full disk while saving, a broken disk) are removed; `tell` says so on standard error, and
    where the run goes on.
    """
    damaged: list[str] = []
    for step, directory in sorted(_checkpoints(output), reverse=True):
        why = _damage(directory, step)
        if why is None:
            if tell:
                _tell(damaged, f"the run goes on from {directory.name}")
            return directory
        damaged.append(f"{directory} is damaged ({why})")
        shutil.rmtree(directory, ignore_errors=True)
    if tell:
        _tell(damaged, "the run begins anew")
    return None


def remove_checkpoints(output: Path) -> None:
    """Take a run's checkpoints away, and their directory if nothing else lies there."""
    for _, directory in _checkpoints(output):
        shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        (output / DIRECTORY).rmdir()


def remove_traces(output: Path) -> None:
    """After a failure: without a checkpoint no trace is left, with one a run that can be resumed.

    Only what the program has made goes. Where other files lie in the directory its record stays, by which the same call
    begins anew.
    """
    is_finished = (output / RECORD).exists() and RunRecord.read(output).is_finished
    if is_finished or not output.is_dir():
        return
    for _, directory in _checkpoints(output):
        if not (directory / TRAINER_STATE_NAME).exists():  # which is written last
            shutil.rmtree(directory, ignore_errors=True)
    # what cannot be read now need not be damaged: the next call looks at it again, and says what it takes away
    if any(_checkpoints(output)):
        return
    remove_checkpoints(output)
    if all(path.name == RECORD for path in output.iterdir()):
        remove(output / RECORD)
        output.rmdir()


def _checkpoints(output: Path) -> Iterator[tuple[int, Path]]:
    for directory in (output / DIRECTORY).glob("checkpoint-*"):
        if (name := _NAME.fullmatch(directory.name)) and directory.is_dir():
            yield int(name[1]), directory


def _damage(checkpoint: Path, step: int) -> str | None:
    """What a checkpoint lacks; None of a whole one."""
    state = read_if_whole(checkpoint / TRAINER_STATE_NAME)  # written last
    if not isinstance(state, dict) or state.get("global_step") != step:
        return f"{TRAINER_STATE_NAME} is missing or not whole"
    sharded = _is_sharded(checkpoint)
    needed = () if sharded else _OF_ONE_MODEL
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if not sharded and not any(checkpoint.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    if missing:
        return f"{missing[0]} is missing"
    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")):
        if not _is_whole_archive(path):
            return f"{path.name} is not whole"
    if (checkpoint / ADAPTER).is_file():
        try:
            saved_shapes(checkpoint)
        except ValueError:
            return f"{ADAPTER} is not whole"
    # of older versions, and of a save that was killed behind its last file, there are none
    digests = read_if_whole(checkpoint / _DIGESTS)
    for name, digest in digests.items() if isinstance(digests, dict) else ():
        if not (checkpoint / name).is_file() or sha256(checkpoint / name) != digest:
            return f"{name} was lost or altered"
    return None


def _is_sharded(checkpoint: Path) -> bool:
    return any(checkpoint.glob("*fsdp*")) or any(checkpoint.glob("global_step*"))


def _is_whole_archive(path: Path) -> bool:
    """Whether a file of torch.save has all its bytes, by the checksums in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile answers damaged bytes with errors of a dozen kinds
        return False


def _tell(damaged: list[str], then: str) -> None:
    for sentence in damaged:
        words_console(stderr=True).print(f"{sentence}; {then}.", markup=False, highlight=False, soft_wrap=True)
