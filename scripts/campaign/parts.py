"""What the parts of the campaign share: a tiny run, the program in this process or in its own, and the results' place.

python scripts/campaign/PART.py --help
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests"), str(ROOT / "src")]
# of its processes too; an empty entry would be the current directory
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:3], os.environ.get("PYTHONPATH")]))

from harness import RESULTS, facts, markdown_facts, write_results  # noqa: E402

CAMPAIGN = RESULTS / "campaign"
LIMIT = 30.0  # seconds, behind which a call hangs


class Hang(BaseException):
    """A call took longer than its limit."""


@dataclass(frozen=True)
class Said:
    """What one call of the program said.

    Attributes:
        code: its exit code; None where it ended in a traceback or did not end.
        out, err: what it printed; a traceback is in `err`.
    """

    code: int | None
    out: str
    err: str

    @property
    def fault(self) -> str | None:
        """What is wrong with how it ended; None for a finished command, or exit code 2 and one sentence."""
        if self.code is None:
            return self.err.strip().splitlines()[-1] if self.err.strip() else "no end"
        if self.code == 0:
            return None
        lines = [line for line in self.err.splitlines() if line.strip()]
        if self.code != 2 or len(lines) != 1 or not lines[0].startswith("scalabl: "):
            return f"exit code {self.code} with {len(lines)} lines: {' / '.join(lines[-2:])[:200]}"
        if self.out and not self.out.startswith(("training: ", "memory: ")):
            return f"a refusal behind results: {self.out[:80]!r}"
        return None


def here(arguments: Sequence[Any], limit: float = LIMIT) -> Said:
    """The program in this process, interrupted where it hangs."""
    from scalabl.cli import main

    def stop(*_: Any) -> None:
        raise Hang

    out, err, code = io.StringIO(), io.StringIO(), None
    given, sys.argv = sys.argv, ["scalabl", *map(str, arguments)]
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Hang:
        err.write(f"no end within {limit:g} s")
    except BaseException:
        err.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.argv = given
    return Said(code, out.getvalue(), err.getvalue())


def apart(arguments: Sequence[Any], limit: float = 4 * LIMIT, **environment: str) -> Said:
    """The program in a process of its own; its start takes seconds, so its limit is longer."""
    command = [sys.executable, "-P", "-m", "scalabl", *map(str, arguments)]
    paths = {"PYTHONPATH": str(ROOT / "src")}
    try:
        made = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=os.environ | paths | environment, check=False
        )
    except subprocess.TimeoutExpired:
        return Said(None, "", f"no end within {limit:g} s")
    traced = "Traceback (most recent call last)" in made.stderr
    return Said(None if traced else made.returncode, made.stdout, made.stderr)


@contextmanager
def offline(directory: Path) -> Iterator[None]:
    """Context without the Hub, and with a cache of its own."""
    own = {"HF_HUB_OFFLINE": "1", "SCALABL_CACHE": str(directory / "cache"), "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def tiny_run(directory: Path, method: str = "scalabl") -> Path:
    """A finished run of four steps on a tiny random model."""
    from tiny_base import tiny_base, write_task

    from scalabl.runs.settings import Settings
    from scalabl.training.run import train

    task = directory / "task"
    if not task.is_dir():
        write_task(task)
    settings = Settings.flat(
        model=str(tiny_base()), data=str(task), method=method, steps=4, batch_size=4, r=4, layers="last:2",
        scoring="continuation", normalization="token", validation_rows=4, learning_rate=0.05,
    )  # fmt: skip
    train(settings, directory / method)
    return directory / method


def tree(directory: Path) -> dict[str, int]:
    """Every file below a directory, with its size."""
    return {str(path.relative_to(directory)): path.lstat().st_size for path in directory.rglob("*") if path.is_file()}


def write(part: str, content: Mapping[str, Any], text: str, **own: str) -> None:
    """docs/results/campaign/PART.json and PART.md: the facts, what was found, and the table."""
    known = facts(**own)
    write_results(CAMPAIGN, part, {"facts": known, **content}, f"{text.strip()}\n\n{markdown_facts(known)}\n")
