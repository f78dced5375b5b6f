"""A full disk of every size, files that may not grow, a read-only disk: one sentence, and nothing half-written.

train, bayesianize, predict, benchmark and evaluate write to a small file system of their own (tmpfs, which needs the
right to mount) that is full after so many bytes, from none to all that an unkilled command needs; where no file may
grow beyond a limit (RLIMIT_FSIZE), from a byte less than each of its files; on a read-only file system; and with a
cache that is full, which may cost time alone. Each must end with exit code 2 and one sentence, leave no hidden file
but the answers from which a prediction goes on, and end with an undisturbed command's bytes once there is room.
Results: docs/results/campaign/full_disk.json and .md.

    python scripts/campaign/full_disk.py --sizes 12
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kills import Command, commands, learn, left, started
from parts import offline, write

from harness import options, table  # isort: skip

PAGE = 4096
RESUMED = ".answers.jsonl."  # what a prediction has answered
ROOM = 512 * 2**20


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """A file system of so many bytes.

    Raises:
        PermissionError: this user may not mount one.
    """
    with tempfile.TemporaryDirectory(prefix="scalabl-disk-") as name:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={max(size, PAGE)}", "tmpfs", name], capture_output=True, check=False
        )
        if made.returncode:
            raise PermissionError(made.stderr.decode().strip())
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=False)


def remount(place: Path, *how: str) -> None:
    """Another size, or read-only."""
    subprocess.run(["mount", "-o", f"remount,{','.join(how)}", str(place)], check=True, capture_output=True)


def call(directory: Path, command: Command, cache: Path, bytes_a_file: int | None = None) -> tuple[int | None, str]:
    """Its exit code and what it wrote to standard error."""
    errors = cache.with_suffix(".err")
    code = started(directory, command, cache, errors, bytes_a_file).wait(300)
    return code, errors.read_text(encoding="utf-8", errors="replace")


def judge(command: Command, code: int | None, error: str, directory: Path, what: str) -> None:
    """Count how it ended, and note what was wrong with that."""
    lines = [line for line in error.splitlines() if line.startswith("scalabl: ")]
    if code == 0:
        command.counts["had room"] += 1
    elif (code == 2 or (code == 1 and "scalabl: Not done: " in error and "Error" not in error)) and (
        len(lines) == 1 and "Traceback" not in error
    ):  # a study ends with what it could not do
        command.counts["refused"] += 1
    else:
        last = error.strip().splitlines()[-1:] or [""]
        command.faults.append(f"{what}: exit code {code}: {last[0][:200]}")
    for name, content in left(directory).items():
        known = name in command.files or (name.startswith(RESUMED) and content.count(b"\n"))
        if any(part.startswith(".") for part in Path(name).parts) and not known:
            command.faults.append(f"{what}: {name} is left over")


def again(command: Command, directory: Path, cache: Path, what: str) -> None:
    """With room, the same command ends as an undisturbed one."""
    code, error = call(directory, command, cache)
    present = left(directory)
    own = {name: content for name, content in command.files.items() if not name.startswith("cache")}
    if code and not ("exists and is not empty" in error and present.keys() == own.keys()):
        command.faults.append(f"{what}, then with room: exit code {code}: {error.strip().splitlines()[-1:]}")
        return
    for name in sorted(present.keys() ^ own.keys()):
        command.faults.append(f"{what}, then with room: {name} is {'left over' if name in present else 'missing'}")
    for name, content in own.items():
        # a cell's log tells of the failure too
        if content is not None and not name.endswith("log.txt") and present.get(name) not in (None, content):
            command.faults.append(f"{what}, then with room: {name} has other bytes")


def small_files(work: Path, command: Command, sizes: int) -> None:
    """No file may grow beyond a byte less than each of the command's files, the smallest first."""
    every = sorted({len(content) for content in command.files.values() if content})
    for size in every[:: max(1, len(every) // sizes)]:
        directory, cache = work / "small", work / "small-cache"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        what = f"files of {size - 1:,} bytes"
        judge(command, *call(directory, command, cache, size - 1), directory, what)
        again(command, directory, cache, what)


def small_disks(work: Path, command: Command, sizes: int) -> None:
    """A disk that is full after a part of what the command needs; a read-only one; a full cache."""
    need = sum(-(-len(content or b"x") // PAGE) * PAGE for content in command.files.values()) * 2
    cache = work / "disk-cache"
    for number in range(sizes):
        size = need * number // sizes
        with disk(size) as place:
            what = f"a disk of {size // 1024:,} KiB"
            judge(command, *call(place, command, cache), place, what)
            remount(place, f"size={ROOM}")
            again(command, place, cache, what)
    with disk(ROOM) as place:
        remount(place, "ro")
        judge(command, *call(place, command, cache), place, "a read-only disk")
    with disk(PAGE) as full, disk(ROOM) as place:
        code, error = call(place, command, full / "cache")
        if code:
            command.faults.append(f"a full cache: exit code {code}: {error.strip().splitlines()[-1:]}")
        command.counts["full cache"] += not code


def main() -> None:
    """Fill disks, and write what came of it."""
    chosen = options(
        __doc__,
        sizes=(12, "of disks and of files, for each command"),
        only=(None, "this command alone"),
        results=("yes", "write them", ("yes", "no")),
    ).parse_args()
    with tempfile.TemporaryDirectory() as name, offline(Path(name)):
        root = Path(__file__).resolve().parents[2]
        sys.path.insert(0, str(root / "tests" / "study"))
        work, mounted = Path(name), "tmpfs"
        every = [command for command in commands(work) if chosen.only in (None, command.name)]
        for command in every:
            learn(work, command)
            small_files(work, command, chosen.sizes)
            try:
                small_disks(work, command, chosen.sizes)
            except PermissionError as error:
                mounted = f"not mounted ({error}): files that may not grow alone"
            print(f"{command.name}: {dict(command.counts)}, {len(command.faults)} faults", flush=True)
            print(*sorted(Counter(command.faults).items())[:12], sep="\n  ", file=sys.stderr, flush=True)
    rows = [
        {"name": each.name, **{k.replace(" ", "_"): each.counts[k] for k in ("refused", "had room", "full cache")},
         "faults": len(each.faults)}
        for each in every
    ]  # fmt: skip
    page = f"""# Full disks

{chosen.sizes} sizes of a disk and as many of the largest file, a read-only disk, and a full cache: exit code 2 and one
sentence, no hidden file, and the undisturbed command's bytes once there is room. A full cache costs no result.

{
        table(
            rows,
            ("command", "{name}"),
            ("refused in a sentence", "{refused}"),
            ("had room", "{had_room}"),
            ("ended beside a full cache", "{full_cache}"),
            ("faults", "{faults}"),
        )
    }
"""
    faults = {each.name: each.faults for each in every if each.faults}
    if chosen.results == "yes":
        write("full_disk", {"commands": rows, "faults": faults}, page, disks=mounted)
    else:
        print(page)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
