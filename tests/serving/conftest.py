"""One finished run, and one of plain LoRA, for everything that is exported and served."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from particle_server import Faults, ParticleServer, serving
from served import NUMBER, SEED
from server_runs import served_runs
from tiny_base import tiny_base

from scalabl.runs.settings import Settings
from scalabl.serving.export import export
from scalabl.serving.manifest import read_manifest
from scalabl.training.run import train


def _trained(output: Path, task: Path, method: str) -> Path:
    settings = {
        "model": str(tiny_base()), "data": str(task), "steps": 3, "batch_size": 4, "r": 4, "layers": "last:2",
        "scoring": "continuation", "normalization": "token", "validation_rows": 4, "learning_rate": 0.1,
        "init_sigma": 0.5, "method": method,
    }  # fmt: skip
    train(Settings.flat(**settings), output)  # type: ignore[arg-type]
    return output


@pytest.fixture(scope="session")
def scored_run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run with a posterior, scored by choice texts; not to be changed."""
    return _trained(tmp_path_factory.mktemp("served") / "run", task_directory, "scalabl")


@pytest.fixture(scope="session")
def plain_run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run of plain LoRA; not to be changed."""
    return _trained(tmp_path_factory.mktemp("served") / "plain", task_directory, "mle")


@pytest.fixture
def copied_run(scored_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(scored_run, tmp_path / "copied"))


@pytest.fixture(scope="session")
def exported(scored_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported")
    export(scored_run, NUMBER, directory, seed=SEED)
    return directory


@pytest.fixture(scope="session")
def running(exported: Path) -> Iterator[ParticleServer]:
    with serving(exported / "particles", read_manifest(exported).adapters) as server:
        yield server


@pytest.fixture
def server(running: ParticleServer) -> ParticleServer:
    """The server, behaving well and with nothing seen; what an earlier client had under way has ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("scalabl-vllm"):
            thread.join(timeout=10)
    running.faults, running.bodies, running.batches, running.under_way = Faults(), [], [], 0
    return running


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs on one base, and "encoder" on another; not to be changed."""
    return served_runs(tmp_path_factory.mktemp("adapters"))
