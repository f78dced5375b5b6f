"""Arguments from the command line's own grammar, and every file that the program reads with its bytes changed.

Files and the commands that read them are in scripts/campaign/readable.py. Each case runs in a fork of this process,
which has imported everything, on a fresh copy of all files. It has to end with exit code 0, or with 2 and one sentence
(1 of a benchmark that could not finish), within 30 s of the processor's time and two minutes by the clock, and to
leave, lose and change no file but its own output.
A case is repeated by its seed and number. Results: docs/results/campaign/fuzz.json and .md.

    python scripts/campaign/fuzz.py --cases 2000
    python scripts/campaign/fuzz.py --seed 0 --only 17
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damage import ARGUMENTS, OUTPUT_OPTIONS, Case, case_of
from parts import LIMIT, Said, offline, write
from readable import READ, build

from harness import options, table  # isort: skip

MEMORY = 16 << 30  # bytes of address space of a case
# where a command keeps what it makes, beside its outputs; of train, what is damaged in a run is taken away too
_KEEPS = {
    "calibrate": ("{1}/scalabl.json", "{1}/README.md", "{1}/mean/README.md"),
    "evaluate": ("{1}/confidence.json",), "export": ("{1}/particles",),
    "benchmark": ("cells", "results", "runs"), "train": ("stopped",), "demo": ("runs",),
}  # fmt: skip


def seen(directory: Path) -> dict[str, Any]:
    """Every file below a directory, with its size and when it was written, or where its link leads."""
    found = [path for path in directory.rglob("*") if path.is_symlink() or path.is_file()]
    stats = {path: path.lstat() for path in found}
    return {
        str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else (stat.st_size, stat.st_mtime_ns)
        for path, stat in stats.items()
    }


def outputs_of(case: Case) -> tuple[str, ...]:
    """Where a case may write."""
    words = case.arguments
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word in OUTPUT_OPTIONS]
    named += [word.partition("=")[2] for word in words if word.startswith(OUTPUT_OPTIONS) and "=" in word]
    kept = [form.format(*words, "", "") for form in _KEEPS.get(words[0] if words else "", ())]
    unfinished = [f"{os.path.dirname(each)}/.{os.path.basename(each)}" for each in named if words[0] == "predict"]
    return tuple(os.path.normpath(each) for each in (*named, *kept, *unfinished, "cache") if each)


def lost(case: Case, said: Said, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What is wrong with the files that a case leaves; None where nothing is."""
    outputs = outputs_of(case)

    def is_output(name: str) -> bool:
        return any(name == each or name.startswith((f"{each}/", f"{each}.")) for each in outputs)

    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    for what, names in (("changed", changed), ("lost", gone)):
        if users := [name for name in names if name.endswith(("notes.txt", "answer.md")) or not is_output(name)]:
            return f"{what}: {users[:3]}"
    if foreign := [name for name in new if not is_output(name)]:
        return f"left behind: {foreign[:3]}"
    begun = ("cache/", "cells/", "results/", "stopped/", "runs/")
    if said.code == 2 and (left := [name for name in new if not name.startswith(begun)]):
        return f"left behind by a refusal: {left[:3]}"
    if hidden := [
        name for name in new if "/." in f"/{name}" and not name.endswith(".lock") and not name.startswith("cache/")
    ]:
        return f"left behind: {hidden[:3]}"
    return None


def fault_of(case: Case, said: Said) -> str | None:
    """What is wrong with how a case ended; None where nothing is."""
    if said.code == 2 and not said.err.strip() and "Usage:" in said.out:
        return None  # help, where no argument is given
    if said.code in (1, 2) and case.arguments[:1] == ("benchmark",):  # a line for each cell that failed stands in front
        return None if "\nscalabl: " in f"\n{said.err}" else f"exit code {said.code} without a sentence"
    if said.code == 2 and said.err.count("\n") > 1:  # what a damaged checkpoint has brought about stands in front
        kept = [line for line in said.err.splitlines() if " is damaged (" not in line]
        said = Said(2, said.out, "\n".join(kept) + "\n")
    if "\x1b]" in said.out + said.err or "\x07" in said.out + said.err:
        return "an escape sequence reaches the terminal"
    return said.fault


def tried(case: Case, place: Path, scratch: Path) -> Said:
    """Run a case in a fork of this process, killed with all its children where it hangs."""
    files = [scratch / name for name in ("out", "err")]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(case, place, files)
    ended = os.pidfd_open(child)
    in_time, _, _ = select.select([ended], [], [], 4 * LIMIT)
    if not in_time:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ended)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in files)
    code = os.waitstatus_to_exitcode(status)
    if not in_time or code == -signal.SIGXCPU:
        return Said(None, out, f"{err}\nno end within {LIMIT:g} s")
    if code < 0:
        return Said(None, out, f"{err}\nkilled by signal {-code}")
    return Said(None if "Traceback (most recent call last)" in err else code, out, err)


def _in_child(case: Case, place: Path, files: Sequence[Path]) -> None:
    os.setpgid(0, 0)
    for number, path in enumerate(files, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, number)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(LIMIT), int(LIMIT) + 1))  # its own: others' work makes no hang
    code = 1
    try:
        os.chdir(place)
        code = _call(case)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(case: Case) -> int:
    from scalabl.core.errors import UserError

    if case.call is None:
        from scalabl.cli import main

        sys.argv = ["scalabl", *case.arguments]
        main()
        return 0
    try:
        case.call()
    except UserError as error:
        print(f"scalabl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _made(place: Path) -> None:
    warnings.simplefilter("ignore")
    place.mkdir()
    os.chdir(place)
    build(place)


def warmed(place: Path) -> None:
    """Import what cases import; no backward pass is made in this process, whose threads a fork would not have."""
    from scalabl.core.console import quiet, quiet_imports

    quiet_imports()
    import datasets  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn  # noqa: F401
    import torch

    import scalabl.study.benchmark
    import scalabl.training.posthoc.run  # noqa: F401
    from scalabl.runs.loading import load_run

    quiet()
    torch.set_num_threads(1)
    for name in ("run", "head"):
        load_run(place / name)
    gc.freeze()  # what a fork does not touch it shares


@dataclass
class Tally:
    """What became of the cases.

    Attributes:
        counts: by kind and outcome: "refused", "finished", "fault".
        faults: each with its seed, its number, what was called and what is wrong.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)

    def try_case(self, seed: int, number: int, root: Path, shown: bool = False) -> None:
        """Try a case on a fresh copy of all files."""
        place, own = root / "place", [root / "tmp", root / "home"]
        for directory in (place, *own):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(root / "good", place, symlinks=True)
        for directory in own:
            directory.mkdir()
        case = case_of(seed, number, place)
        before = seen(place)
        said = tried(case, place, root)
        fault = fault_of(case, said) or lost(case, said, before, seen(place))
        if fault is None and (stray := [path.name for directory in own for path in directory.iterdir()]):
            fault = f"left behind in the system's place: {stray[:3]}"
        self.counts[case.kind, "fault" if fault else "finished" if said.code == 0 else "refused"] += 1
        if fault:
            self.faults.append(
                {"seed": seed, "case": number, "kind": case.kind, "fault": fault, "words": case.words[:2000]}
            )
        if fault or shown:
            out = said.out[-2000:] if shown else ""
            print(f"{seed}-{number}: {fault}\n  {case.words}\n{out}{said.err[-1800:]}", file=sys.stderr, flush=True)


def prepared(root: Path) -> None:
    """Make the files, in a process of its own, and import what reads them."""
    place = root / "place"
    os.environ |= {"SCALABL_CACHE": str(place / "cache"), "HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
    for name in ("home", "tmp"):
        (root / name).mkdir()
    maker = multiprocessing.get_context("spawn").Process(target=_made, args=(place,))
    maker.start()
    maker.join()
    if maker.exitcode:
        sys.exit("the files could not be made")
    (place / "link").symlink_to("out/nowhere/x")
    warmed(place)
    place.rename(root / "good")


def main() -> None:
    """Try the cases, and write what became of them."""
    chosen = options(
        __doc__, cases=(2000, "how many"), seed=(0, "of all cases"), only=(-1, "this one alone, shown whole"),
        results=("yes", "write them", ("yes", "no")),
    ).parse_args()  # fmt: skip
    sys.argv[0] = str(Path(sys.argv[0]).resolve())  # the directory changes
    warnings.simplefilter("ignore")
    numbers = range(chosen.cases) if chosen.only < 0 else [chosen.only]
    tally, started = Tally(), time.monotonic()
    print(f"seed {chosen.seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, offline(Path(name)):
        root = Path(name).resolve()
        prepared(root)
        with suppress(KeyboardInterrupt):  # what was tried until then is written
            for number in numbers:
                tally.try_case(chosen.seed, number, root, shown=chosen.only >= 0)
                if number % 100 == 99:
                    words = f"{number + 1} tried, {len(tally.faults)} faults, {time.monotonic() - started:.0f} s"
                    print(words, file=sys.stderr, flush=True)
        os.chdir("/")
    outcomes = ("refused", "finished", "fault")
    rows = [
        {"kind": kind, **{outcome: tally.counts[kind, outcome] for outcome in outcomes}}
        for kind in (ARGUMENTS, *(each.line for each in READ))
    ]
    rows.append({"kind": "all"} | {name: sum(row[name] for row in rows) for name in outcomes})
    page = f"""# Arguments, and damaged files

{sum(tally.counts.values()):,} calls: arguments from the command line's own grammar, and every file that the program
reads with its bytes changed, each on a fresh copy of all files. Refused: exit code 2 and one sentence (of a benchmark
that could not do all of its work, 1), and no file left. Finished: it was good enough. A fault is anything else: a
traceback, more than {LIMIT:g} s, a file left, lost or changed that was not the command's own output.

{table(rows, ("kind", "{kind}"), ("refused", "{refused}"), ("finished", "{finished}"), ("faults", "{fault}"))}
"""
    took = f"{time.monotonic() - started:.0f} s"
    if chosen.results == "yes" and chosen.only < 0:
        write("fuzz", {"rows": rows, "faults": tally.faults}, page, took=took, seed=str(chosen.seed))
    else:
        print(page, took)
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()
