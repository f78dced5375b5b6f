"""A Ray cluster by its address: reached, or refused in a sentence before any work. Imports Ray only when asked."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.interpreters import safe_paths


def require_ray() -> None:
    """Refuse before any work.

    Raises:
        UserError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError('--ray needs a package that is not installed: pip install "scalabl[ray]"')


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster until the context ends.

    Args:
        address: of the cluster's head, "auto", or "local" for a cluster that lives as long as the context. Where this
            process is connected already, that connection is used and left open.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    require_ray()
    # a program that asks for no network reports no usage either
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    _require_answer(address)
    job = ray.job_config.JobConfig()
    job._py_driver_sys_path = _NoPaths()
    try:
        dashboard = False if address == "local" else None
        with safe_paths(), _loopback(ray) if address == "local" else contextlib.nullcontext():
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=dashboard,
                job_config=job,
            )  # fmt: skip
    except Exception as error:  # Ray raises that very class where a local cluster does not come up in time
        raise UserError(f"The Ray cluster {address} cannot be reached: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _loopback(ray: Any) -> Iterator[None]:
    """Context in which a cluster that is started listens on this machine alone: Ray's own way on macOS and Windows."""
    constants, name = ray._private.ray_constants, "ENABLE_RAY_CLUSTER"
    before = getattr(constants, name)
    setattr(constants, name, False)
    try:
        yield
    finally:
        setattr(constants, name, before)


class _NoPaths(list[str]):
    """In the place of what Ray puts in front of its workers' path: the directory where the user happens to stand."""

    def extend(self, paths: Iterable[str]) -> None:
        """Keep none."""


def gpus_each(ray: Any) -> int:
    """How many GPUs a task asks for: one where the cluster has any."""
    return 1 if ray.cluster_resources().get("GPU") else 0


def _require_answer(address: str) -> None:
    """Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "local", "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The Ray cluster {address} cannot be reached ({error}); give HOST:PORT of its head, or local."
        ) from error
