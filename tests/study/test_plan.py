"""Cells have the address of everything that decides them, and of nothing else; no work is planned twice."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_base import as_json, questions, write_jsonl, write_task
from tiny_study import content

from scalabl.core.errors import UserError
from scalabl.study.cells import POST_HOC, PREDICTION, TRAINING, address_of
from scalabl.study.plan import PREDICTIVE_REVISIONS, REVISIONS, StudyPlan, make_plan
from scalabl.study.study import make_study, read_study

BASE = Path("/base")
ROOT = Path(__file__).parents[2]


def plan(task: Path, **changes: Any) -> StudyPlan:
    return make_plan(make_study(content(BASE, task, **changes), "tiny"))


def addresses(made: StudyPlan, kind: str) -> set[str]:
    return {address for address, cell in made.cells.items() if cell.kind == kind}


def test_trained_runs_are_shared(task_directory: Path) -> None:
    mean = {"name": "mean", "method": "scalabl", "samples": 0}
    methods = ["mle", "temperature", "ensemble", "laplace", "tfb", "scalabl", mean]
    made = plan(task_directory, methods=methods, seeds=[0, 1, 2])
    trained = [made.cells[address].settings["recipe"] for address in addresses(made, TRAINING)]
    assert sorted((r["method"], r["seed"]) for r in trained) == [(m, s) for m in ("mle", "scalabl") for s in range(3)]
    assert len(addresses(made, POST_HOC)) == 1 + 3 + 3
    assert len(addresses(made, PREDICTION)) == len(made.entries) == 1 + 5 * 3
    (ensemble,) = (entry for entry in made.entries if entry.variant.method == "ensemble")
    mle = [entry for entry in made.entries if entry.variant.method == "mle"]
    assert ensemble.seeds == (0, 1, 2) and ensemble.training == tuple(entry.training[0] for entry in mle)


def test_a_cell_stands_behind_what_it_needs_and_early_seeds_come_first(task_directory: Path) -> None:
    made = plan(task_directory, seeds=[5, 3])
    order = list(made.cells)
    for address, cell in made.cells.items():
        assert all(order.index(need) < order.index(address) for need in cell.needs)
    alone = [entry for entry in made.entries if len(entry.seeds) == 1]
    last_early = max(order.index(entry.prediction) for entry in alone if entry.seeds == (5,))
    assert last_early < min(order.index(entry.training[0]) for entry in alone if entry.seeds == (3,))


def test_an_address_does_not_depend_on_what_stands_beside_it(task_directory: Path) -> None:
    whole = plan(task_directory)
    few = plan(task_directory, methods=["scalabl"], seeds=[1])
    assert set(few.cells) < set(whole.cells)
    named = plan(task_directory, methods=[{"name": "another name", "method": "scalabl"}], seeds=[1])
    assert set(named.cells) == set(few.cells)


def test_every_setting_changes_the_address_of_its_cells(task_directory: Path) -> None:
    before = plan(task_directory, methods=["scalabl"])
    settings = content(BASE, task_directory)["settings"]
    after = plan(task_directory, methods=["scalabl"], settings=settings | {"init_sigma": 0.06})
    assert not set(before.cells) & set(after.cells)
    samples = plan(task_directory, methods=["scalabl"], samples=4)
    assert addresses(samples, TRAINING) == addresses(before, TRAINING)
    assert not addresses(samples, PREDICTION) & addresses(before, PREDICTION)
    # one pass is one pass, however many samples others take
    one_pass = [set(plan(task_directory, methods=["mle"], samples=n).cells) for n in (3, 4)]
    assert one_pass[0] == one_pass[1]


def test_test_rows_decide_predictions_alone_and_training_rows_everything(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    before = plan(task)
    write_jsonl(task / "test.jsonl", map(as_json, questions(12, seed=77)))
    other_test = plan(task)
    for kind in (TRAINING, POST_HOC):
        assert addresses(before, kind) == addresses(other_test, kind)
    assert not addresses(before, PREDICTION) & addresses(other_test, PREDICTION)
    limited = plan(task, test_rows=5)
    assert addresses(before, TRAINING) == addresses(limited, TRAINING)
    assert not addresses(other_test, PREDICTION) & addresses(limited, PREDICTION)
    lines = (task / "validation.jsonl").read_text().splitlines()
    changed = json.loads(lines[0])
    changed["answer"] = (changed["answer"] + 1) % len(changed["choices"])
    (task / "validation.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
    assert not set(plan(task).cells) & set(other_test.cells)


@pytest.mark.parametrize("name", ["kl", "rank"])
def test_cells_of_results_that_were_published_have_the_addresses_that_they_had(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for methods that have come to something else since, under the same settings, and what all trainings have."""
    monkeypatch.setattr("scalabl.study.plan.TRAINING_REVISION", 0)
    with (ROOT / "docs" / "results" / "ablations" / name / "results.csv").open() as file:
        cells = {row["cell"]: row["method"] for row in csv.DictReader(file)}
    study = read_study(ROOT / "recipes" / "ablations" / f"{name}.yaml")
    revised = {cell for cell, method in cells.items() if method.startswith("scalabl")}
    assert set(cells) - set(make_plan(study).cells) == revised and revised
    monkeypatch.setattr("scalabl.study.plan.REVISIONS", {})
    assert set(cells) <= set(make_plan(study).cells)


@pytest.mark.parametrize(("method", "kind"), [("scalabl", TRAINING), ("laplace", POST_HOC)])
def test_a_method_that_was_revised_has_cells_of_its_own(
    task_directory: Path, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = plan(task_directory, methods=["mle", method])
    monkeypatch.setitem(REVISIONS, method, REVISIONS[method] + 1)
    later = plan(task_directory, methods=["mle", method])
    assert len(now.cells) == len(later.cells)
    assert addresses(now, kind) != addresses(later, kind)
    of_mle = set(plan(task_directory, methods=["mle"]).cells)
    assert set(now.cells) & set(later.cells) == of_mle


def test_rows_that_are_missing_are_missed_at_once(tmp_path: Path, shifted_directory: Path) -> None:
    with pytest.raises(UserError, match="no 'train' split"):
        plan(shifted_directory)
    task = write_task(tmp_path / "task")
    (task / "test.jsonl").unlink()
    with pytest.raises(UserError, match="no 'test' split"):
        plan(task)
    unlabelled = [{name: value for name, value in as_json(row).items() if name != "answer"} for row in questions(3)]
    write_jsonl(task / "test.jsonl", unlabelled)
    with pytest.raises(UserError, match="answer"):
        plan(task)
    with pytest.raises(UserError, match="no benchmark is called 'arc-esay'"):
        make_plan(make_study(content(BASE, Path("arc-esay")), "tiny"))


def test_a_predictive_is_a_prediction_of_its_own_and_mc_has_the_address_it_always_had(task_directory: Path) -> None:
    before = plan(task_directory, methods=["scalabl"], seeds=[0])
    named = plan(task_directory, methods=[{"method": "scalabl", "predictive": "mc"}], seeds=[0])
    assert set(named.cells) == set(before.cells)
    (address,) = addresses(before, PREDICTION)
    cell = before.cells[address]
    settings = {
        "format": 1, "kind": "prediction", "method": "scalabl", "run": cell.needs[0], "post_hoc": None, "samples": 3,
        "seed": 0, "task": str(task_directory), "test_sets": cell.settings["test_sets"], "test_rows": None,
        "shift_rows": None, "batch_size": 8,
    }  # fmt: skip
    assert cell.as_dict() == settings and address == address_of(settings)

    def with_predictive(name: str, **more: int) -> StudyPlan:
        return plan(
            task_directory,
            methods=["scalabl", {"name": "x", "method": "scalabl", "predictive": name, **more}],
            seeds=[0],
        )

    for name, samples in (("linearized", 0), ("auto", 3)):
        made = with_predictive(name)
        assert addresses(made, TRAINING) == addresses(before, TRAINING)
        (own,) = addresses(made, PREDICTION) - {address}
        revised = {"revision": PREDICTIVE_REVISIONS[name]} if name in PREDICTIVE_REVISIONS else {}
        assert made.cells[own].as_dict() == settings | {"samples": samples, "predictive": name} | revised
    assert PREDICTIVE_REVISIONS.keys() == {"auto", "calibrated"}  # those that choose
    # a linearisation draws nothing, a choice keeps the quality of N
    assert set(with_predictive("linearized", samples=7).cells) == set(with_predictive("linearized").cells)
    assert set(with_predictive("auto", samples=7).cells) != set(with_predictive("auto").cells)


def test_the_post_hoc_posterior_is_fitted_on_plain_loras(task_directory: Path) -> None:
    made = plan(task_directory, methods=["mle", "subspace_laplace"])
    assert addresses(made, TRAINING) == addresses(plan(task_directory, methods=["mle"]), TRAINING)
    fits = [made.cells[address] for address in addresses(made, POST_HOC)]
    assert len(fits) == 2 and all(fit.settings["method"] == "subspace_laplace" for fit in fits)
