"""Processes that one command starts on this machine, each with its share of the cores.

A terminal's Ctrl-C goes to the command alone, which hands it on: a second one would not wait for a checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from scalabl.core.console import progress_in_lines, quiet_imports
from scalabl.core.errors import UserError
from scalabl.core.interpreters import safe_paths

T = TypeVar("T")
R = TypeVar("R")


def threads_each(workers: int) -> int:
    """The cores of this machine, shared evenly; at least one."""
    return max(1, (os.cpu_count() or 1) // workers)


def processor() -> str:
    """What its maker calls it, where Linux says; the architecture elsewhere."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return " ".join(next(line for line in lines if line.startswith("model name")).partition(":")[2].split())
    return platform.machine()


def begin_worker(threads: int) -> None:
    """What a worker does first, before it imports torch.

    Args:
        threads: of torch.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
    with contextlib.suppress(AttributeError, OSError):
        os.setsid()  # away from the terminal
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_imports()
    progress_in_lines()


def _end_with_parent() -> None:
    """A worker whose command was killed must not go on unseen."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def interrupt_workers() -> None:
    """Ctrl-C for every worker of this process."""
    for process in multiprocessing.active_children():
        if process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)


def side_by_side(work: Callable[[T], R], parts: Sequence[T], *, workers: int) -> list[R]:
    """What `work` makes of every part, in the parts' order; one worker alone is this process.

    Args:
        work: a function at a module's top, which a new process can import.
        parts: plain values, begun in their order: the longest first, and the workers end together.
        workers: processes at most.

    Raises:
        UserError: a worker was killed, for example for want of memory.
        KeyboardInterrupt: Ctrl-C; every worker has had it too, and has ended as `work` does.
        Exception: what `work` raised first; the others were then interrupted.
    """
    workers = min(workers, len(parts))
    if workers <= 1:
        return [work(part) for part in parts]
    context = multiprocessing.get_context("spawn")
    with safe_paths(), ProcessPoolExecutor(workers, context, _begin, (threads_each(workers),)) as pool:
        futures = [pool.submit(_interruptible, work, part) for part in parts]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BrokenProcessPool:
            raise UserError("A worker was killed, often for want of memory; run the same command again.") from None
        except BaseException:
            _stop(pool)
            raise
        return [future.result() for future in futures]


_interrupted = False  # before a part had begun: while what it needs was imported, or between two parts


def _remember(signum: int, frame: Any) -> None:
    global _interrupted
    _interrupted = True


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, _remember)
    begin_worker(threads)


def _interruptible(work: Callable[[T], R], part: T) -> R:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if _interrupted:
            raise KeyboardInterrupt
        return work(part)
    finally:
        signal.signal(signal.SIGINT, _remember)


def _stop(pool: ProcessPoolExecutor) -> None:
    """Begin no other part, interrupt those that run and wait for them; a second Ctrl-C does not wait."""
    pool.shutdown(wait=False, cancel_futures=True)
    interrupt_workers()
    try:
        pool.shutdown(wait=True)
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()
