"""All cells of a plan done by a Ray cluster whose machines share the benchmark's directory."""

from __future__ import annotations

import importlib.util
import socket
import uuid
from pathlib import Path
from typing import Any

from scalabl.benchmark.cells import Cell, finished
from scalabl.benchmark.plan import Plan
from scalabl.benchmark.run import WAIT, Report, attempt, open_cells
from scalabl.errors import UserError


def require_ray() -> None:
    """Refuse before any work.

    Raises:
        UserError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError('--ray needs a package that is not installed: pip install "scalabl[ray]"')


def run_ray(plan: Plan, output: Path, address: str, *, report: Report | None = None) -> None:
    """Do every cell as a Ray task of one core (and one GPU, where the cluster has any).

    Args:
        plan: what to do.
        output: the benchmark's directory, the same path on every machine.
        address: of the cluster, "auto", or "local" for one that lives as long as this call.
        report: called now and then.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    require_ray()
    import ray

    _require_answer(address)
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False if address == "local" else None)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"The Ray cluster {address} cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=2)(_do)
        _submit(ray, task, plan, output.resolve(), uuid.uuid4().hex, report)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "local", "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The Ray cluster {address} cannot be reached ({error}); give HOST:PORT of its head, or local."
        ) from error


def _submit(ray: Any, task: Any, plan: Plan, output: Path, invocation: str, report: Report | None) -> None:
    # a task whose needs were lost does nothing, so that every order of failures comes to an end
    submitted: dict[str, Any] = {}
    for cell in open_cells(plan, output, invocation):
        needs = [submitted[need] for need in cell.needs if need in submitted]
        submitted[cell.address] = task.remote(cell, str(output), invocation, *needs)
    waiting = list(submitted.values())
    while waiting:
        done, waiting = ray.wait(waiting, timeout=WAIT)
        for reference in done:
            ray.get(reference)
        if report is not None:
            report()


def _do(cell: Cell, output: str, invocation: str, *needs: Any) -> None:
    from scalabl.cli.quiet import quiet, quiet_imports

    quiet_imports()
    import torch  # noqa: F401  (before `quiet`, which turns down what importing it has turned up)

    quiet()
    if all(finished(Path(output), need) is not None for need in cell.needs):
        attempt(cell, Path(output), invocation)
