"""All cells of a plan done: by this process, or by several that claim cells from each other by lock files.

A cell is claimed by locking cells/ADDRESS.lock. The operating system frees the lock of a process that dies, however
it dies, so another one, or the next call, takes the cell up; a training run goes on from its last checkpoint. Calls
on several machines that share the directory help each other in the same way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from filelock import FileLock, Timeout

from scalabl.benchmark.cells import Cell, failure, finished
from scalabl.benchmark.plan import Plan
from scalabl.errors import UserError
from scalabl.run_directory import write_json

WAIT = 0.5  # seconds between looks at cells that others hold
Report = Callable[[], None]


def open_cells(plan: Plan, output: Path, invocation: str) -> list[Cell]:
    """Cells that are neither finished, nor failed in this call, nor in need of one that did."""
    lost: set[str] = set()
    found = []
    for address, cell in plan.cells.items():
        if finished(output, address) is not None:
            continue
        failed = failure(output, address)
        if lost.intersection(cell.needs) or (failed is not None and failed.get("invocation") == invocation):
            lost.add(address)
        else:
            found.append(cell)
    return found


def run_here(plan: Plan, output: Path, *, invocation: str | None = None, report: Report | None = None) -> None:
    """Do every cell that nobody else does, in this process, until nothing is open.

    Args:
        plan: what to do.
        output: the benchmark's directory.
        invocation: name of the call; cells that failed in it are not tried twice.
        report: called after each cell.

    Raises:
        Interrupted: Ctrl-C in a training run.
    """
    invocation = invocation or uuid.uuid4().hex
    while cells := open_cells(plan, output, invocation):
        for cell in cells:
            if all(finished(output, need) is not None for need in cell.needs) and attempt(cell, output, invocation):
                break
        else:
            time.sleep(WAIT)
        if report is not None:
            report()


def attempt(cell: Cell, output: Path, invocation: str) -> bool:
    """Do a cell unless another process holds it; a failure is noted down, and the work goes on elsewhere.

    Returns:
        whether it was ours to do.

    Raises:
        Interrupted: Ctrl-C in a training run.
    """
    from scalabl.benchmark.work import do
    from scalabl.training.run import Interrupted

    directory = cell.directory(output)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{directory}.lock", blocking=False):
            failed = failure(output, cell.address)
            if finished(output, cell.address) or (failed and failed.get("invocation") == invocation):
                return False
            with _said_in(directory / "log.txt"):
                try:
                    do(cell, output)
                except Interrupted:
                    raise
                except Exception as error:
                    traceback.print_exc()
                    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                    write_json(directory / "failed.json", {"error": " ".join(text.split()), "invocation": invocation})
            return True
    except Timeout:
        return False


def run_workers(plan: Plan, output: Path, workers: int, *, report: Report | None = None) -> None:
    """Do every cell with so many processes on this machine, which share its cores evenly.

    Args:
        plan: what to do.
        output: the benchmark's directory.
        workers: how many.
        report: called now and then.

    Raises:
        UserError: every worker died (out of memory, for example) before the work was done.
        KeyboardInterrupt: Ctrl-C; the workers have saved their checkpoints.
    """
    invocation = uuid.uuid4().hex
    context = multiprocessing.get_context("spawn")
    with _environment(OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // workers))):
        processes = [
            context.Process(target=_worker, args=(plan, output, invocation), name=f"worker {i}") for i in range(workers)
        ]
        for process in processes:
            process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(WAIT)
            if report is not None:
                report()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # a second one does not wait for checkpoints
            for process in processes:
                if process.pid and process.is_alive():
                    os.kill(process.pid, signal.SIGINT)
            for process in processes:
                process.join()
        raise
    finally:
        for process in processes:
            process.kill()
    _explain_deaths(processes, len(open_cells(plan, output, invocation)))


def _worker(plan: Plan, output: Path, invocation: str) -> None:
    from scalabl.cli.quiet import quiet, quiet_imports

    # away from the terminal: Ctrl-C comes once, from the call, since a second one would not wait for a checkpoint
    with contextlib.suppress(AttributeError, OSError):
        os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt):
        quiet_imports()
        from scalabl.training.run import Interrupted

        quiet()
        with contextlib.suppress(Interrupted):
            run_here(plan, output, invocation=invocation)


def _end_with_parent() -> None:
    """A worker whose call was killed must not go on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _explain_deaths(processes: Sequence[BaseProcess], left: int) -> None:
    codes = sorted({process.exitcode for process in processes if process.exitcode})
    if left and codes:
        raise UserError(
            f"Every worker ended early (exit {', '.join(map(str, codes))}; -9 is often too little memory), with "
            f"{left} cells to do; run the same command again, perhaps with fewer --workers."
        )


def failures(plan: Plan, output: Path) -> dict[str, str]:
    """Label of each cell that failed when last tried -> why; cells that only wait for one of them are left out."""
    return {
        cell.label: str(failed["error"])
        for address, cell in plan.cells.items()
        if finished(output, address) is None and (failed := failure(output, address)) is not None
    }


@contextmanager
def _said_in(path: Path) -> Iterator[None]:
    """Context whose standard error (bars, warnings, tracebacks) goes to a file."""
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        yield


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
