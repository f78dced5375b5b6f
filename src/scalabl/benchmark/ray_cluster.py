"""All cells of a plan done by a Ray cluster whose machines share the benchmark's directory."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from scalabl.benchmark.cells import Cell, finished
from scalabl.benchmark.plan import Plan
from scalabl.benchmark.run import WAIT, Report, attempt, open_cells
from scalabl.ray_address import connected, gpus_each


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
    with connected(address) as ray:
        task = ray.remote(num_cpus=1, num_gpus=gpus_each(ray), max_retries=2)(_do)
        _submit(ray, task, plan, output.resolve(), uuid.uuid4().hex, report)


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
