"""What the cells hold is what the methods say; nothing is trained twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_base import write_task
from tiny_study import Done, content

from scalabl.core.errors import UserError
from scalabl.data import load_task
from scalabl.data.load import rows_of
from scalabl.inference.calibrate import calibrate
from scalabl.inference.predictor import Predictor, labels_of, log_probabilities
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.uncertainty import fit_temperature
from scalabl.runs.loading import load_run
from scalabl.runs.method import load_post_hoc
from scalabl.runs.settings import Settings
from scalabl.study.cells import PREDICTION, TRAINING, address_of, finished
from scalabl.study.plan import Entry, make_plan
from scalabl.study.predictions import read_predictions
from scalabl.study.study import make_study
from scalabl.study.work import RUN, do
from scalabl.training.run import select_rows


def entry_of(done: Done, name: str, seed: int = 0) -> Entry:
    return next(e for e in done.plan.entries if e.variant.name == name and seed in e.seeds)


def test_every_cell_is_where_its_settings_say_and_is_finished(done: Done) -> None:
    directories = {path.name for path in (done.output / "cells").iterdir() if path.is_dir()}
    assert directories == set(done.plan.cells)
    for address in directories:
        settings = json.loads((done.output / "cells" / address / "settings.json").read_text())
        assert address_of(settings) == address
        facts = finished(done.output, address)
        assert facts and facts["seconds"] > 0 and facts["peak_memory"] > 50 and "torch" in facts["versions"]
    runs = {path.parent.parent.name for path in done.output.rglob("scalabl.json")}
    assert runs == {address for address, cell in done.plan.cells.items() if cell.kind == TRAINING} and len(runs) == 4


@pytest.mark.parametrize(("name", "particles"), [("mle", 1), ("scalabl", 3), ("scalabl mean", 1)])
@pytest.mark.parametrize("seed", [0, 1])
def test_predictions_are_those_of_the_run(done: Done, name: str, particles: int, seed: int) -> None:
    entry = entry_of(done, name, seed)
    held = read_predictions(done.plan.cells[entry.prediction], done.output)
    run = load_run(done.output / "cells" / entry.training[0] / RUN)
    strategy = run.predictive("mean" if particles == 1 else None, samples=3, seed=seed)
    validation = select_rows(load_task(done.task), Settings.flat(**run.record.recipe).rows).validation
    for (log_probs, labels), rows in [
        (held.validation, validation),
        (held.tests[done.task], rows_of(done.task, split="test")),
        (held.tests[done.other], rows_of(done.other)),
    ]:
        assert log_probs.shape[:2] == (particles, len(rows))
        torch.testing.assert_close(log_probs, log_probabilities(run, rows, strategy), atol=1e-5, rtol=0)
        assert torch.equal(labels, labels_of(rows))


def test_other_predictives_of_the_same_run(done: Done, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(done.output, output)
    methods = [{"name": name, "method": "scalabl", "predictive": name} for name in ("linearized", "auto")]
    base = Path(done.study.model)
    made = make_plan(make_study(content(base, Path(done.task), methods=methods, seeds=[0]), "tiny"))
    linear, auto = (made.cells[entry.prediction] for entry in made.entries)
    assert set(made.cells) - set(done.plan.cells) == {linear.address, auto.address}
    facts = {cell.address: do(cell, output) for cell in (linear, auto)}
    assert "choice" not in facts[linear.address] and facts[auto.address]["choice"].startswith("auto chose ")
    run = load_run(output / "cells" / made.entries[0].training[0] / RUN)
    held = read_predictions(linear, output)
    rows = rows_of(done.task, split="test")
    expected = log_probabilities(run, rows, run.predictive("linearized", seed=0))
    torch.testing.assert_close(held.tests[done.task][0], expected)
    chosen = read_predictions(auto, output).tests[done.task][0]
    by_draws = read_predictions(done.plan.cells[entry_of(done, "scalabl").prediction], output).tests[done.task][0]
    assert chosen.shape[0] in (by_draws.shape[0], expected.shape[0])


def test_calibrated_predictions_are_those_of_a_run_that_was_calibrated(done: Done, tmp_path: Path) -> None:
    output, task = tmp_path / "output", tmp_path / "task"
    task.mkdir()
    write_task(task, validation=24)
    methods = [{"name": "shipped", "method": "scalabl", "predictive": "calibrated"}]
    recipe = content(Path(done.study.model), task, methods=methods, seeds=[0], validation_rows=24)
    plan = make_plan(make_study(recipe, "tiny"))
    facts = [do(cell, output) for cell in plan.cells.values()]
    (entry,) = plan.entries
    cell, choice = plan.cells[entry.prediction], facts[-1]["choice"]
    held = read_predictions(cell, output)
    directory = tmp_path / "run"
    shutil.copytree(output / "cells" / entry.training[0] / RUN, directory)
    run = load_run(directory)
    validation = select_rows(load_task(str(task)), Settings.flat(**run.record.recipe).rows).validation
    settings = PredictionSettings(samples=cell.settings["samples"])
    _, made = calibrate(directory, validation, settings)
    predictor = Predictor.load(directory, settings)
    predictor.resolve(validation)
    assert choice == f"{predictor.settings.why} {made.in_words()}"
    assert facts[-1]["fit_seconds"] > facts[-1]["seconds"] > 0  # the search for tau is no part of a prediction
    rows = rows_of(str(task), split="test")
    expected = log_probabilities(predictor.whole_run(), rows, predictor.strategy)
    torch.testing.assert_close(held.tests[str(task)][0], expected, atol=1e-5, rtol=0)
    # its temperature, which the tables fit, is the one that the run keeps
    fitted = fit_temperature(*held.validation)
    assert fitted == pytest.approx(made.temperature, rel=1e-3)


def test_the_ensembles_particles_are_its_members(done: Done) -> None:
    ensemble = read_predictions(done.plan.cells[entry_of(done, "ensemble").prediction], done.output)
    for seed in (0, 1):
        member = read_predictions(done.plan.cells[entry_of(done, "mle", seed).prediction], done.output)
        for task in (done.task, done.other):
            torch.testing.assert_close(ensemble.tests[task][0][seed], member.tests[task][0][0], atol=1e-5, rtol=0)


def test_a_fit_lies_in_its_own_cell_and_leaves_the_run_alone(done: Done) -> None:
    entry = entry_of(done, "tfb")
    assert entry.post_hoc
    run = load_run(done.output / "cells" / entry.training[0] / RUN)
    assert not (done.output / "cells" / entry.training[0] / RUN / "posthoc").exists()
    facts = load_post_hoc("tfb").facts(replace(run, directory=done.output / "cells" / entry.post_hoc))
    assert facts["rows"] == 24


def test_predictions_that_were_altered_are_refused(done: Done, tmp_path: Path) -> None:
    cell = done.plan.cells[entry_of(done, "mle").prediction]
    copy = cell.directory(tmp_path)
    copy.mkdir(parents=True)
    for name in ("finished.json", "predictions.safetensors"):
        (copy / name).write_bytes((cell.directory(done.output) / name).read_bytes())
    read_predictions(cell, tmp_path)
    whole = (copy / "predictions.safetensors").read_bytes()
    (copy / "predictions.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="missing or was altered; delete"):
        read_predictions(cell, tmp_path)


def test_rows_that_changed_since_the_plan_are_refused(done: Done) -> None:
    cell = next(cell for cell in done.plan.cells.values() if cell.kind == PREDICTION)
    sets = {name: facts | {"sha256": "0"} for name, facts in cell.settings["test_sets"].items()}
    with pytest.raises(UserError, match="not those that were planned"):
        do(replace(cell, settings=cell.settings | {"test_sets": sets}), done.output)
