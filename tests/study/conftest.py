"""One tiny study, run once for all tests that read it."""

from pathlib import Path

import pytest
from tiny_base import as_json, questions, write_jsonl
from tiny_study import Done, content

from scalabl.study.benchmark import run_benchmark
from scalabl.study.plan import make_plan
from scalabl.study.study import make_study


@pytest.fixture(scope="session")
def shifted_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that are only tested on."""
    directory = tmp_path_factory.mktemp("shifted")
    write_jsonl(directory / "test.jsonl", map(as_json, questions(10, seed=9)))
    return directory


@pytest.fixture(scope="session")
def done(
    tmp_path_factory: pytest.TempPathFactory, base_directory: Path, task_directory: Path, shifted_directory: Path
) -> Done:
    task, other = str(task_directory), str(shifted_directory)
    study = make_study(content(base_directory, task_directory, shift={task: [other]}), "tiny")
    plan, output = make_plan(study), tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALABL_CACHE", str(tmp_path_factory.mktemp("benchmark-cache")))
        rows = run_benchmark(study, plan, output, output, command="scalabl benchmark tiny.yaml")
    return Done(study, plan, output, rows, task, other)
