"""All cells of a plan done: by this process, by several, or by a Ray cluster that shares the benchmark's directory.

A cell is claimed by locking cells/ADDRESS.lock. The operating system frees the lock of a process that dies, however
it dies, so another one, or the next call, takes the cell up; a training run goes on from its last checkpoint. Calls
on several machines that share the directory help each other in the same way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from scalabl.core.console import quiet, quiet_imports
from scalabl.core.errors import UserError, explain
from scalabl.core.files import write_json
from scalabl.core.interpreters import safe_paths
from scalabl.core.workers import begin_worker, interrupt_workers, threads_each
from scalabl.serving.ray_address import connected, gpus_each
from scalabl.study.cells import Cell, failure, finished, is_elsewhere
from scalabl.study.plan import StudyPlan

WAIT = 0.5  # seconds between looks at cells that others do
Report = Callable[[], Any]


def _no_report() -> None:
    pass


def open_cells(plan: StudyPlan, output: Path, invocation: str) -> list[Cell]:
    """Cells that are neither finished, nor failed in this call, nor in need of one that did; finished elsewhere alone
    does not help a cell that needs one."""
    lost: set[str] = set()
    found = []
    lacking = _lacking(plan, output)
    for address, cell in plan.cells.items():
        if address not in lacking:
            continue
        failed = failure(output, address)
        if lost.intersection(cell.needs) or (failed is not None and failed.get("invocation") == invocation):
            lost.add(address)
        else:
            found.append(cell)
    return found


def _lacking(plan: StudyPlan, output: Path) -> set[str]:
    lacking: set[str] = set()
    needed: set[str] = set()
    for address, cell in reversed(list(plan.cells.items())):  # a cell stands behind those that it needs
        done = finished(output, address)
        if done is None or (is_elsewhere(done) and address in needed):
            lacking.add(address)
            needed.update(cell.needs)
    return lacking


def _is_here(output: Path, address: str) -> bool:
    done = finished(output, address)
    return done is not None and not is_elsewhere(done)


def failures(plan: StudyPlan, output: Path) -> dict[str, str]:
    """Label of each cell that failed when last tried -> why; cells that only wait for one of them are left out."""
    return {
        cell.label: str(failed["error"])
        for address, cell in plan.cells.items()
        if finished(output, address) is None and (failed := failure(output, address)) is not None
    }


def run_here(plan: StudyPlan, output: Path, *, invocation: str | None = None, report: Report = _no_report) -> None:
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
    while cells := open_cells(plan := plan.renewed(output), output, invocation):
        if not any(_can_begin(cell, output) and attempt(cell, output, invocation) for cell in cells):
            time.sleep(WAIT)
        report()


def _can_begin(cell: Cell, output: Path) -> bool:
    return all(_is_here(output, need) for need in cell.needs)


def attempt(cell: Cell, output: Path, invocation: str) -> bool:
    """Do a cell unless another process does; a failure is noted down, and the work goes on elsewhere.

    Returns:
        whether it was ours to do.

    Raises:
        Interrupted: Ctrl-C in a training run.
    """
    from scalabl.study.work import do
    from scalabl.training.monitors import NonFiniteError

    directory = cell.directory(output)
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Timeout), FileLock(f"{directory}.lock", blocking=False):
        failed = failure(output, cell.address)
        if _is_here(output, cell.address) or (failed and failed.get("invocation") == invocation):
            return False
        with (directory / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            try:
                do(cell, output)
            except Exception as error:
                traceback.print_exc()
                text = explain(error) or f"{type(error).__name__}: {error}"
                facts: dict[str, Any] = {"error": " ".join(text.split()), "invocation": invocation}
                diverged = {"diverged": True} if isinstance(error, NonFiniteError) else {}
                write_json(directory / "failed.json", facts | diverged)
        return True
    return False


def run_workers(plan: StudyPlan, output: Path, workers: int, *, report: Report = _no_report) -> None:
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
    invocation, context = uuid.uuid4().hex, multiprocessing.get_context("spawn")
    work = (plan, output, invocation, threads_each(workers))
    processes = [context.Process(target=_worker, args=work) for _ in range(workers)]
    with safe_paths():
        for process in processes:
            process.start()
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(WAIT)
            report()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # a second one does not wait for checkpoints
            interrupt_workers()
            for process in processes:
                process.join()
        raise
    finally:
        for process in processes:
            process.kill()
    codes = sorted({process.exitcode for process in processes if process.exitcode})
    if codes and (left := len(open_cells(plan.renewed(output), output, invocation))):
        raise UserError(
            f"Every worker ended early (exit {', '.join(map(str, codes))}; -9 is often too little memory), with "
            f"{left} cells to do; run the same command again, perhaps with fewer --workers."
        )


def _worker(plan: StudyPlan, output: Path, invocation: str, threads: int) -> None:
    begin_worker(threads)
    with contextlib.suppress(KeyboardInterrupt):  # the command says so; a training has kept its checkpoint
        quiet()
        run_here(plan, output, invocation=invocation)


def run_ray(plan: StudyPlan, output: Path, address: str, *, report: Report = _no_report) -> None:
    """Do every cell as a Ray task of one core (and one GPU, where the cluster has any).

    Args:
        plan: what to do.
        output: the benchmark's directory, the same path on every machine.
        address: of the cluster, "auto", or "local" for one that lives as long as this call.
        report: called now and then.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    output, invocation = output.resolve(), uuid.uuid4().hex
    cells = open_cells(plan := plan.renewed(output), output, invocation)
    if not cells:
        return
    with connected(address) as ray:
        task = ray.remote(num_cpus=1, num_gpus=gpus_each(ray), max_retries=2)(_task)
        # a task whose needs were lost does nothing, so that every order of failures comes to an end
        submitted: dict[str, Any] = {}
        waiting: list[Any] = []
        while waiting or any(cell.address not in submitted for cell in cells):
            for cell in cells:
                if cell.address not in submitted:
                    needs = [submitted[need] for need in cell.needs if need in submitted]
                    submitted[cell.address] = task.remote(cell, output, invocation, *needs)
                    waiting.append(submitted[cell.address])
            done, waiting = ray.wait(waiting, timeout=WAIT)
            ray.get(done)
            report()
            cells = open_cells(plan := plan.renewed(output), output, invocation)


def _task(cell: Cell, output: Path, invocation: str, *_needs: Any) -> None:
    quiet_imports()
    import torch  # noqa: F401  (before `quiet`, which turns down what importing it has turned up)

    quiet()
    if _can_begin(cell, output):
        attempt(cell, output, invocation)
