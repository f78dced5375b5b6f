"""SIGKILL at random moments: the same command again ends with the bytes of one that was never killed.

train, bayesianize, predict, benchmark and evaluate, each in a directory and with a cache of its own, are killed once or
twice at a random moment and then left to end. Afterwards the directory and the cache must hold the files of an unkilled
command, with the same bytes, and no other file, hidden or not. Files whose bytes differ between two unkilled commands
(they say how long something took) are only there or not. Results: docs/results/campaign/kills.json and .md.

    python scripts/campaign/kills.py --kills 100
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parts import offline, tiny_run, write

from harness import options, table  # isort: skip

STEPS = ("--steps", 30, "--save-steps", 5, "--rank", 4, "--layers", "last:2", "--scoring", "continuation")


@dataclass
class Command:
    """A command, and what an unkilled one leaves.

    Attributes:
        name: of the table.
        arguments: with relative paths for what it writes.
        seconds: that it takes unkilled.
        files: name -> bytes of what it leaves; None where two unkilled ones differ.
        counts: kills, by what they met.
        faults: sentences.
    """

    name: str
    arguments: list[Any]
    seconds: float = 0.0
    files: dict[str, bytes | None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def commands(work: Path) -> list[Command]:
    """The five, on finished runs of a tiny model."""
    import yaml
    from tiny_base import as_json, questions, tiny_base, write_jsonl
    from tiny_study import content

    run, plain, task = tiny_run(work), tiny_run(work, "mle"), work / "task"
    rows = write_jsonl(work / "rows.jsonl", map(as_json, questions(60)))
    study = content(tiny_base(), task, methods=["mle", "tfb", "scalabl"], seeds=[0])
    study["settings"] |= {"steps": 30, "save_steps": 5}
    (work / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    return [
        Command("train", ["train", "--model", tiny_base(), "--data", task, "--output", "run", *STEPS]),
        Command("bayesianize", ["bayesianize", plain, "--data", task, "--output", "run"]),
        Command("predict", ["predict", run, "--input", rows, "--output", "answers.jsonl", "--batch-size", 2]),
        Command("benchmark", ["benchmark", work / "study.yaml", "--output", "study"]),
        Command("evaluate", ["evaluate", run, "--data", task, "--json", "figures.json", "--report", "report.html"]),
    ]


def left(directory: Path) -> dict[str, bytes]:
    """Every file below it."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def limited(bytes_a_file: int | None, *arguments: Any) -> None:
    """The program where no file may become larger; where any may if None."""
    from own_process import program

    if bytes_a_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, resource.RLIM_INFINITY))
    program(*arguments)


def started(directory: Path, command: Command, cache: Path, errors: Path, bytes_a_file: int | None = None) -> Any:
    """The command in a process of its own, in this directory and with this cache; `errors` gets its standard error."""
    from own_process import OwnProcess

    before, cache_before = os.getcwd(), os.environ["SCALABL_CACHE"]
    os.environ["SCALABL_CACHE"] = str(cache)
    os.chdir(directory)
    try:
        return OwnProcess(limited, bytes_a_file, *command.arguments, stderr=errors)
    finally:
        os.chdir(before)
        os.environ["SCALABL_CACHE"] = cache_before


def begun(directory: Path, command: Command) -> Any:
    """The same with a cache inside the directory."""
    directory.mkdir(exist_ok=True)
    return started(directory, command, directory / "cache", directory.with_suffix(".err"))


def ended(directory: Path, command: Command) -> str | None:
    """Let the command end; what was wrong with its end."""
    code = begun(directory, command).wait(300)
    error = directory.with_suffix(".err").read_text(encoding="utf-8", errors="replace").strip()
    return None if code == 0 else f"exit code {code}: {error.splitlines()[-1] if error else ''}"


def learn(work: Path, command: Command) -> None:
    """What an unkilled command leaves, from two of them.

    Raises:
        SystemExit: it fails by itself.
    """
    found = []
    for number in range(2):
        directory = work / f"{command.name}-{number}"
        start = time.monotonic()
        wrong = ended(directory, command)
        if wrong:
            sys.exit(f"{command.name} fails without a kill: {wrong}")
        command.seconds = time.monotonic() - start
        found.append(left(directory))
    one, two = found
    if one.keys() != two.keys():
        sys.exit(f"two unkilled {command.name} leave different files: {sorted(one.keys() ^ two.keys())}")
    command.files = {name: content if content == two[name] else None for name, content in one.items()}


def kill(work: Path, command: Command, chance: random.Random, times: int) -> None:
    """Kill it so often, let it end, and compare."""
    directory = work / "killed"
    shutil.rmtree(directory, ignore_errors=True)
    for _ in range(times):
        process = begun(directory, command)
        process.join(chance.uniform(0, command.seconds))
        met = "at work" if process.poll() is None else "ended before"
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.join()
        command.counts[met] += 1
    wrong = ended(directory, command)
    present = left(directory)
    if wrong and "exists and is not empty" in wrong and present.keys() == command.files.keys():
        wrong = None  # it had ended, and its result is not made twice
    if wrong:
        command.faults.append(wrong)
    for name in sorted(present.keys() ^ command.files.keys()):
        command.faults.append(f"{name} is {'left over' if name in present else 'missing'}")
    for name, content in command.files.items():
        if content is not None and name in present and present[name] != content:
            command.faults.append(f"{name} has other bytes")


def main() -> None:
    """Kill, and write what came of it."""
    chosen = options(
        __doc__, kills=(100, "of all commands together"), seed=0, results=("yes", "write them", ("yes", "no"))
    ).parse_args()
    chance = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as name, offline(Path(name)):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "study"))
        work = Path(name)
        every = commands(work)
        for command in every:
            learn(work, command)
            print(f"{command.name}: {command.seconds:.1f} s, {len(command.files)} files", flush=True)
        done = 0
        while done < chosen.kills:
            command = every[done % len(every)] if done < len(every) else chance.choice(every)
            times = min(chance.choice((1, 1, 2)), chosen.kills - done)
            kill(work, command, chance, times)
            done += times
            faults = sum(len(command.faults) for command in every)
            print(f"{done} of {chosen.kills} kills, {faults} faults", flush=True)
    faults = {command.name: command.faults for command in every if command.faults}
    columns: tuple[tuple[str, str | Callable[[Any], str]], ...] = (
        ("command", "{name}"),
        ("killed at work", "{at_work}"),
        ("had ended", "{ended_before}"),
        ("files", "{files}"),
        ("of them with times inside", "{timed}"),
        ("faults", "{faults}"),
    )
    rows = [
        {
            "name": each.name,
            "at_work": each.counts["at work"],
            "ended_before": each.counts["ended before"],
            "files": len(each.files),
            "timed": sum(content is None for content in each.files.values()),
            "faults": len(each.faults),
        }
        for each in every
    ]
    timed = {each.name: sorted(n for n, content in each.files.items() if content is None) for each in every}
    page = f"""# Kills

{done} times SIGKILL at a random moment, the same command again, and its files held against those of an unkilled one:
the same names, no other file, the same bytes but for files that say how long something took.

{table(rows, *columns)}
"""
    if chosen.results == "yes":
        write("kills", {"commands": rows, "faults": faults, "with_times": timed}, page, seeds=str(chosen.seed))
    else:
        print(page)
    for of, wrong in faults.items():
        print(of, *sorted(Counter(wrong).items())[:8], sep="\n  ", file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
