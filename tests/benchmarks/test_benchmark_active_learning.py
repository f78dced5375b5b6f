"""Active learning at toy size: who labels what, that nothing known is done again, and what the page says."""

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import active_learning
import pytest
from active_learning import curves, markdown, verdict
from tiny_base import tiny_base, tiny_encoder, write_texts

from scalabl.data import load_rows, load_task
from scalabl.data.assemble import shuffled
from scalabl.data.load import with_labels
from scalabl.inference.acquisition import informativeness, most_informative, random_order
from scalabl.inference.predictor import Predictor, log_probabilities
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.uncertainty import average
from scalabl.runs.loading import load_run
from scalabl.scoring import trunk_store

TOY = ["--seeds", "1", "--rounds", "2", "--start", "6", "-k", "2", "--pool", "14", "--test-rows", "5", "--steps", "2"]
TOY += ["--strategies", "bald", "random", "--samples", "3"]
SEED = "seed1"


@dataclass
class Toy:
    """A study that was run: its places, what was computed of frozen layers (rows at a time), and its settings."""

    line: list[str]
    runs: Path
    results: Path
    computed: list[int] = field(default_factory=list)
    study: active_learning.Study | None = None

    def cells(self) -> dict[str, dict[str, Any]]:
        return {path.parent.name: json.loads(path.read_text()) for path in self.runs.glob("*/*/figures.json")}

    def csv(self) -> str:
        return (self.results / "active_learning.csv").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, task_directory: Path) -> Iterator[Toy]:
    folder = tmp_path_factory.mktemp("study")
    runs, results = folder / "runs", folder / "results"
    places = ["--model", str(tiny_base()), "--data", str(task_directory), "--runs", str(runs), "--output", str(results)]
    made = Toy(["active_learning.py", *TOY, *places], runs, results)
    compute, study_of = trunk_store._compute, active_learning.study_of

    def remember(arguments: argparse.Namespace) -> active_learning.Study:
        made.study = study_of(arguments)
        return made.study

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALABL_CACHE", str(folder / "cache"))
        patch.setattr("sys.argv", made.line)
        patch.setattr(trunk_store, "_compute", lambda *a: made.computed.append(len(a[1])) or compute(*a))
        patch.setattr(active_learning, "study_of", remember)
        active_learning.main()
        yield made


def test_every_round_adds_what_its_strategy_wants_and_trains_on_all_of_it(toy: Toy) -> None:
    cells = toy.cells()
    assert cells.keys() == {f"{SEED}-{name}" for name in ("start-0", "bald-1", "bald-2", "random-1", "random-2")}
    start = cells[f"{SEED}-start-0"]
    assert len(set(start["labelled"])) == 6 and start["picked"].keys() == {"bald", "random"}
    assert toy.study is not None
    for by in ("bald", "random"):
        first, second = cells[f"{SEED}-{by}-1"], cells[f"{SEED}-{by}-2"]
        assert first["labelled"] == start["labelled"] + start["picked"][by]
        assert second["labelled"] == first["labelled"] + first["picked"][by] and second["picked"] == {}
        assert len(set(second["labelled"])) == 10
        (path,) = toy.runs.glob(f"*/{SEED}-{by}-2/rows/train.jsonl")
        assert list(load_rows(path)) == [toy.study.pool[i] for i in second["labelled"]]
        record = json.loads((path.parents[1] / "run" / "scalabl.json").read_text())
        assert record["rows"] == {"train": 10, "validation": active_learning.VALIDATION_ROWS}
    assert not {row.question for row in toy.study.pool} & {row.question for row in toy.study.validation}
    # another seed starts with other rows
    orders = [most_informative(random_order(14, 1000 * seed), 6) for seed in range(4)]
    assert orders[1] == start["labelled"] and len(set(map(tuple, orders))) == 4


def test_picks_are_the_highest_scores_among_the_rows_that_are_left(toy: Toy) -> None:
    assert toy.study is not None
    for name in ("start-0", "bald-1"):
        cell = toy.cells()[f"{SEED}-{name}"]
        (directory,) = toy.runs.glob(f"*/{SEED}-{name}/run")
        run = load_run(directory)
        log_probs = log_probabilities(run, toy.study.pool, run.predictive(samples=3, seed=1))
        scores = informativeness(log_probs, "bald").tolist()
        left = [i for i in range(14) if i not in cell["labelled"]]
        assert cell["picked"]["bald"] == sorted(left, key=lambda i: -scores[i])[:2]


def test_the_figures_are_written(toy: Toy) -> None:
    lines = list(csv.DictReader(io.StringIO(toy.csv())))
    cells = toy.cells()
    assert len(lines) == len(cells)
    for line in lines:
        cell = cells[f"seed{line['seed']}-{line['by']}-{line['round']}"]
        assert [float(line[metric]) for metric in active_learning.METRICS] == [
            cell[metric] for metric in active_learning.METRICS
        ]
        assert int(line["labelled"]) == len(cell["labelled"])
    page = (toy.results / "active_learning.md").read_text(encoding="utf-8")
    for fact in ("- seeds: 1", "- versions: ", "- device: ", "- command: ", f"- model: {tiny_base()}", "5 test rows"):
        assert fact in page
    assert (toy.results / "active_learning.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_frozen_layers_of_the_test_rows_and_the_pool_are_computed_once(toy: Toy) -> None:
    assert toy.computed[:3] == [6, 5, 14]
    assert sorted(toy.computed[3:]) == [8, 8, 10, 10]  # what each round trains on


def test_nothing_known_is_done_again(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    before, cells, done = toy.csv(), toy.cells(), []
    train = active_learning.train
    monkeypatch.setattr(active_learning, "train", lambda *a: done.append(a[1].parent.name) or train(*a))
    active_learning.main()
    assert done == [] and toy.csv() == before
    (killed,) = toy.runs.glob(f"*/{SEED}-bald-1/figures.json")
    killed.unlink()
    active_learning.main()
    assert done == [f"{SEED}-bald-1"] and toy.cells() == cells and toy.csv() == before


def test_a_pool_that_is_too_small_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [*toy.line, "--rounds", "5"])
    with pytest.raises(SystemExit, match=r"the pool has 14 rows and 6 \+ 5 x 2"):
        active_learning.main()


def test_a_head_starts_with_rows_of_every_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path / "cache"))
    data, runs, results = write_texts(tmp_path / "texts"), tmp_path / "runs", tmp_path / "results"
    line = ["active_learning.py", "--per-class", "2", "--seeds", "1", "--rounds", "1", "-k", "3", "--pool", "26"]
    line += ["--test-rows", "5", "--steps", "2", "--samples", "3", "--strategies", "margin", "distance", "random"]
    places = ["--model", str(tiny_encoder()), "--data", str(data), "--runs", str(runs), "--output", str(results)]
    monkeypatch.setattr("sys.argv", [*line, *places, "--name", "heads"])
    active_learning.main()
    assert {path.name for path in results.iterdir()} == {"heads.csv", "heads.md", "heads.svg"}
    (file,) = runs.glob("*/seed1-start-0/figures.json")
    start = json.loads(file.read_text())
    rows = [json.loads(line) for line in (file.parent / "rows" / "train.jsonl").read_text().splitlines()]
    assert Counter(row["label"] for row in rows) == dict.fromkeys({row["label"] for row in rows}, 2) and len(rows) == 6

    run, pool = load_run(file.parent / "run"), shuffled(load_task(str(data)).split("train"), seed=0)[4:30]
    pool = with_labels(pool, run.record.labels, data)
    left = [i for i in range(26) if i not in start["labelled"]]
    probs = average(log_probabilities(run, pool, run.predictive(samples=3, seed=1))).sort(dim=1).values
    gap = (probs[:, -1] - probs[:, -2]).tolist()
    assert start["picked"]["margin"] == sorted(left, key=gap.__getitem__)[:3]
    away = Predictor(run, PredictionSettings("mean", raw=True)).mean_scores(pool)["distance"].tolist()
    assert start["picked"]["distance"] == sorted(left, key=lambda i: -away[i])[:3]


def _cell(by: str, seed: int, labelled: int, nll: float) -> dict[str, Any]:
    figures = {"accuracy": 0.5, "nll": nll, "ece": 0.1}
    return {"seed": seed, "by": by, "round": labelled // 10 - 1, "labelled": list(range(labelled)), **figures}


def test_the_page_tells_a_difference_from_noise() -> None:
    cells = [_cell("start", seed, 10, 2.0 + seed) for seed in range(3)]
    assert verdict(curves(cells)) == "" and markdown(curves(cells), {})
    cells += [_cell("random", seed, 20, 1.0 + seed) for seed in range(3)]
    # BALD is better in every pair by about the same, entropy now better, now worse
    cells += [_cell("bald", seed, 20, 0.8 + seed + 0.01 * (seed == 1)) for seed in range(3)]
    cells += [_cell("entropy", seed, 20, (1.3, 1.8, 2.9)[seed]) for seed in range(3)]
    said = verdict(curves(cells))
    assert "With 20 rows BALD beat random: NLL 0.197 nats lower" in said
    assert "With 20 rows total entropy is not shown to beat random" in said
    page = markdown(curves(cells), {})
    assert "| BALD | 20 | 50.0 ± 0.0 | 1.803 ± 1.000 | +0.0 (+0.0 to +0.0) | −0.197 (−0.211 to −0.182)* |" in page
    assert "| BALD | 10 | 50.0 ± 0.0 | 3.000 ± 1.000 | – | – |" in page
