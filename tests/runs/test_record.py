"""A run's record as files of every age have it."""

import json
from pathlib import Path

import pytest

from scalabl.runs.record import RunRecord
from scalabl.runs.settings import DEFAULTS, Settings


@pytest.mark.parametrize(("said", "held"), [({}, 0.0), ({"prior_mean": 0.3}, 0.3)])
def test_a_record_from_before_the_priors_mean_has_zero(said: dict[str, float], held: float, tmp_path: Path) -> None:
    older = {name: value for name, value in Settings.flat(prior_std=0.7).as_dict().items() if name != "prior_mean"}
    (tmp_path / "scalabl.json").write_text(json.dumps({"recipe": older | said, "status": "finished"}))
    posterior = RunRecord.read(tmp_path).settings.posterior
    assert (posterior.prior_mean, posterior.prior_std) == (held, 0.7) and DEFAULTS["prior_mean"] != 0
