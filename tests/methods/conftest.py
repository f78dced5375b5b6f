"""Tiny finished runs of every trained method, each made once for all tests here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_base import as_json, questions, write_jsonl

from scalabl.data import Example
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.settings import make_settings
from scalabl.training.run import train

TRAIN, VALIDATION, TEST = questions(16, seed=0), questions(8, seed=1), questions(7, seed=2)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods-cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SCALABL_CACHE", str(cache))
    yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, base_directory: Path, cache: Path) -> Callable[..., Path]:
    """method, seed and settings -> the directory of a finished run of 12 steps."""
    made: dict[str, Path] = {}
    task = tmp_path_factory.mktemp("methods-task")
    for split, rows in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        write_jsonl(task / f"{split}.jsonl", map(as_json, rows))

    def make(method: str, seed: int = 0, **changes: Any) -> Path:
        settings = {
            "model": str(base_directory), "data": str(task), "method": method, "seed": seed, "steps": 12,
            "batch_size": 4, "r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "layers": "last:2",
            "scoring": "continuation", "normalization": "token",
        } | changes  # fmt: skip
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{method}-{seed}") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SCALABL_CACHE", str(cache))
                train(make_settings(settings), made[key])
        return made[key]

    return make


@pytest.fixture
def mle(trained: Callable[..., Path]) -> Run:
    """A plain LoRA, loaded afresh."""
    return load_run(trained("mle"))


@pytest.fixture(scope="session")
def test_rows() -> list[Example]:
    return TEST


@pytest.fixture(scope="session")
def train_rows() -> list[Example]:
    return TRAIN


@pytest.fixture(scope="session")
def validation_rows() -> list[Example]:
    return VALIDATION
