"""One finished run of each method for the commands that read one."""

from pathlib import Path

import pytest
from program import short

from scalabl.training.run import train


@pytest.fixture(scope="session")
def scalabl_run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run with a posterior; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "scalabl"
    train(short(task_directory, learning_rate=0.05), output)
    return output


@pytest.fixture(scope="session")
def mle_run(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Path:
    """A finished run of plain LoRA; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "mle"
    train(short(task_directory, method="mle", learning_rate=0.05), output)
    return output
