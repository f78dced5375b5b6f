"""The deep ensemble: the average of its members, which are finished runs that nothing trains again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.metrics.uncertainty import average
from scalabl.predictive import MeanPredictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_post_hoc

ensemble = load_post_hoc("ensemble")


@pytest.fixture
def first(trained: Callable[..., Path], tmp_path: Path) -> Run:
    """A copy of a run, so that what is fitted stays the test's own."""
    return load_run(Path(shutil.copytree(trained("mle"), tmp_path / "first")))


def test_the_ensemble_is_the_members_average(
    first: Run, trained: Callable[..., Path], test_rows: list[Example]
) -> None:
    others = [trained("mle", seed=1), trained("mle", seed=2)]
    facts = ensemble.fit(first, [], [], members=others)
    assert [m["seed"] for m in facts["members"]] == [1, 2]
    together = predict(first.scorer, first.encode(test_rows), ensemble.predictive(first))
    alone = []
    for directory in (first.directory, *others):
        run = load_run(directory)  # type: ignore[arg-type]
        alone.append(predict(run.scorer, run.encode(test_rows), MeanPredictive())[0])
    torch.testing.assert_close(together, torch.stack(alone), atol=2e-5, rtol=0)
    by_hand = torch.stack([a.double().exp() for a in alone]).mean(0)
    torch.testing.assert_close(average(together), by_hand, atol=1e-5, rtol=0)
    assert (together[0].exp() - together[1].exp()).abs().max() > 1e-3
    # the run is still its own first member
    mean = predict(first.scorer, first.encode(test_rows), MeanPredictive())
    torch.testing.assert_close(mean[0], together[0], atol=1e-6, rtol=0)


def test_members_are_found_again_and_read_once(first: Run, trained: Callable[..., Path]) -> None:
    ensemble.fit(first, [], [], members=[trained("mle", seed=1)])
    assert first.directory is not None
    stored = json.loads((first.directory / "posthoc" / "ensemble" / "ensemble.json").read_text())
    assert not Path(stored["members"][0]["path"]).is_absolute()
    fresh = load_run(first.directory)
    assert ensemble.predictive(fresh).samples == ensemble.predictive(fresh).samples == 2  # type: ignore[attr-defined]
    assert len(fresh.scorer.model.peft_config) == 2


def test_what_is_no_ensemble_is_refused(first: Run, trained: Callable[..., Path], tmp_path: Path) -> None:
    assert first.directory is not None
    with pytest.raises(UserError, match="members that differ"):
        ensemble.fit(first, [], [])
    with pytest.raises(UserError, match="members that differ"):
        ensemble.fit(first, [], [], members=[first.directory])
    with pytest.raises(UserError, match="members that differ"):
        ensemble.fit(first, [], [], members=[trained("mle", seed=1), trained("mle", seed=1)])
    with pytest.raises(UserError, match="differs in method"):
        ensemble.fit(first, [], [], members=[trained("map")])
    with pytest.raises(UserError, match="differs in learning_rate"):
        ensemble.fit(first, [], [], members=[trained("mle", seed=1, learning_rate=2e-2)])
    with pytest.raises(UserError, match="no run directory"):
        ensemble.fit(first, [], [], members=[tmp_path / "nothing"])


def test_a_member_that_was_trained_anew_is_refused(first: Run, trained: Callable[..., Path], tmp_path: Path) -> None:
    member = Path(shutil.copytree(trained("mle", seed=1), tmp_path / "second"))
    ensemble.fit(first, [], [], members=[member])
    shutil.rmtree(member)
    shutil.copytree(trained("mle", seed=2), member)
    with pytest.raises(UserError, match="trained anew"):
        ensemble.predictive(first)
