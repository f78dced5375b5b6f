"""ScalaBL's posterior on a finished plain LoRA, as a method beside the others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalabl.data import Example, load_task
from scalabl.metrics.uncertainty import average
from scalabl.posterior.joint import KEPT, STRUCTURES
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_post_hoc
from scalabl.training.posthoc.run import bayesianize
from scalabl.training.posthoc.settings import read_source, settings_for

subspace_laplace = load_post_hoc("subspace_laplace")


@pytest.mark.parametrize("held_out", [0, 8])
def test_it_predicts_as_the_run_that_bayesianize_makes(
    trained: Callable[..., Path], train_rows: list[Example], test_rows: list[Example], tmp_path: Path, held_out: int
) -> None:
    directory = trained("mle")
    run = load_run(directory)
    evidence = subspace_laplace.fit(run, train_rows, [])["prior_precision"]
    answers = predict(run.scorer, run.encode(test_rows), MeanPredictive())[0].argmax(dim=1)  # the less noise the better
    choosing = [replace(row, answer=int(answer)) for row, answer in zip(test_rows, answers, strict=True)][:held_out]
    facts = subspace_laplace.fit(run, train_rows, choosing)
    assert facts["prior_precision"] > evidence if choosing else facts["prior_precision"] == evidence
    source = read_source(directory)
    task = load_task(run.record.recipe["data"])
    settings = settings_for(source, run.record.recipe["data"])
    record = bayesianize(source, task, tuple(train_rows), tuple(choosing), tmp_path / "run", settings)
    assert facts["prior_precision"] == pytest.approx(record.bayesianized["prior_precision"], rel=1e-3)
    made, rows = load_run(tmp_path / "run"), run.encode(test_rows)
    for kind, own in (("linearized", LinearizedPredictive(seed=4)), ("mc", MonteCarloPredictive(6, seed=4))):
        ours = subspace_laplace.predictive(run, samples=6, seed=4, kind=kind)  # type: ignore[arg-type]
        expected = average(predict(made.scorer, rows, own))
        torch.testing.assert_close(average(predict(run.scorer, rows, ours)), expected, atol=2e-3, rtol=0)
    assert record.predictive == "linearized" == subspace_laplace.predictive(run).name


def test_the_run_is_a_plain_lora_before_and_after(
    mle: Run, train_rows: list[Example], test_rows: list[Example]
) -> None:
    rows = mle.encode(test_rows)
    before = predict(mle.scorer, rows, MeanPredictive())
    subspace_laplace.fit(mle, train_rows, [])
    drawn = predict(mle.scorer, rows, subspace_laplace.predictive(mle))
    assert torch.equal(predict(mle.scorer, rows, MeanPredictive()), before)
    assert (average(drawn).float() - before[0].exp()).abs().max() > 1e-4


def test_dropping_structure_changes_the_predictions(
    mle: Run, train_rows: list[Example], test_rows: list[Example]
) -> None:
    subspace_laplace.fit(mle, train_rows, [])
    rows = mle.encode(test_rows)
    found = {}
    for structure in STRUCTURES:
        for kept in KEPT:
            strategy = subspace_laplace.predictive(mle, structure=structure, kept=kept)  # type: ignore[arg-type]
            found[structure, kept] = average(predict(mle.scorer, rows, strategy))
    torch.testing.assert_close(found["joint", "marginal"], found["joint", "conditional"])
    different = [found["joint", "marginal"], *(p for key, p in found.items() if key[0] != "joint")]
    for i, one in enumerate(different):
        for other in different[i + 1 :]:
            assert (one - other).abs().max() > 1e-6
