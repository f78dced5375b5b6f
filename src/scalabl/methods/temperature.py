"""Temperature scaling (Guo et al. 2017, 1706.04599): one scalar on the class logits, fitted on held-out rows.

    p_T(y | x) = softmax(log p(y | x) / T),   T minimises the NLL of validation rows

It composes with every method: the temperature is on each particle's logits, before they are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.inference.predictor import labels_of
from scalabl.inference.settings import temperature_in
from scalabl.methods.saved import SavedMethod
from scalabl.metrics.calibration import bounded_temperature
from scalabl.metrics.uncertainty import apply_temperature
from scalabl.predictive.base import Predictive, predict
from scalabl.runs.method import Run
from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.trunk_store import with_stored_trunk


class TemperedPredictive:
    """log softmax(log p_n / T) of every particle n of another predictive.

    Args:
        inner: the predictive.
        temperature: T, positive.
    """

    def __init__(self, inner: Predictive, temperature: float) -> None:
        self.inner = inner
        self.temperature = temperature
        self.name = inner.name
        self.shares_prefix = getattr(inner, "shares_prefix", False)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        log_probs = self.inner(scorer, batch)
        # of several labels, of each by itself
        tempered = apply_temperature(scorer.scoring.likelihood.questions(log_probs), self.temperature)
        return tempered.reshape(log_probs.shape)


class Temperature(SavedMethod):
    """The temperature of the run's own predictive, on its particles."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
        samples: int = 10,
    ) -> dict[str, Any]:
        """The temperature of the run's own predictive on validation rows.

        Raises:
            UserError: there are no validation rows.
        """
        if not validation_rows:
            raise UserError("A temperature needs validation rows, but there are none; give a validation split.")
        inner = run.predictive(samples=samples, seed=seed)
        encoded = with_stored_trunk(run.scorer, run.encode(list(validation_rows)), batch_size=batch_size)
        log_probs = predict(run.scorer, encoded, inner, batch_size=batch_size)
        questions = run.scorer.scoring.likelihood.questions(log_probs)
        temperature = bounded_temperature(questions, labels_of(validation_rows))
        return self.save(run, {"temperature": temperature, "rows": len(validation_rows), "samples": samples})

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        """The run's own predictive with the temperature on its particles."""
        temperature = temperature_in(self.facts(run), self.directory_of(run) / f"{self.name}.json")
        return TemperedPredictive(run.predictive(samples=samples, seed=seed), temperature)
