"""What decides a prediction: one object with one serialiser, which alone travels to workers. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.class_balance import check_priors
from scalabl.inference.promise import Promise
from scalabl.inference.scope import SCOPE_SCORES
from scalabl.metrics.conformal import SET_SCORES, rows_for_coverage
from scalabl.metrics.selective import Threshold
from scalabl.predictive.sampling import PLAIN, PREDICTIVES, Sampling

_YOUNGER: dict[str, Any] = {  # with their defaults
    "scale": None, "raw": False, "priors": None, "max_false_alarms": None, "oos_score": None, "oos_above": None,
    "coverage": None, "set_score": "lac", "per_class": False, "set_thresholds": None,
    "feature_variance": None,
}  # fmt: skip


def is_answered(answer: Mapping[str, Any]) -> bool:
    """Whether a row's answer, as `predict` writes it, gives its label or its labels."""
    return answer.get("label", answer.get("labels")) is not None


def temperature_in(facts: Mapping[str, Any], path: Path) -> float:
    """The temperature in a file of facts.

    Raises:
        UserError: there is none, or it is no number above 0.
    """
    value = facts.get("temperature")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{path}: temperature is {value!r}; it must be a number above 0; fit it again.")
    return float(value)


def refuse_of_one_label(**given: Any) -> None:
    """Refuse settings that are about the one right label of a row, for rows that may have several.

    Args:
        given: settings by name; None, False and no priors are none.

    Raises:
        UserError: the first that is given.
    """
    for name, value in given.items():
        if value:
            raise UserError(
                f"{name} is about the one right label of a row, and rows of this run may have several; leave it out."
            )


@dataclass(frozen=True)
class PredictionSettings:
    """Settings that decide the answers of a run.

    Attributes:
        predictive: "mean", "mc", "linearized" or "auto"; None is what the record says, else auto, or mc where
            `sampling` is not plain.
        samples: N of mc; 0 is the mean.
        seed: of the particles.
        sampling: the kind of draws, and adaptive N; `abstain` is the threshold of adaptive N.
        stochastic_layers: draw s in the top layers alone: "last:K", a fraction "last:0.25", or "variance:0.9", the
            fewest that carry so much of the predictive variance on the run's validation rows.
        feature_variance: linearised, the variance in every direction of what a head reads, by which all its logits but
            one difference are uncertain; None is as the posterior has it, or what auto takes.
        method: a post-hoc method that was fitted on the run, in place of the run's own.
        temperature: T on the class logits of every particle. T and tau are a calibrated run's own where neither is
            given here; given are both, the other one 1.
        scale: tau, by which the posterior's standard deviations are multiplied; 1 is as learnt.
        raw: leave the run's own calibration out.
        priors: how often each label is where predictions are made, in place of its share of the training rows; they sum
            to 1. They come behind scale and temperature, which were fitted under the training rows' own.
        abstain: answer null where the highest probability is below this.
        promise: answer null where an answer would break it.
        chosen: what auto took, as in a table; None before `Predictor.resolve`, and where nothing was to choose.
        why: its sentence.
        threshold: keeps the promise; None before `Predictor.resolve`.
        max_false_alarms: answer null where a row is further out of scope than all but this share of rows in scope.
        oos_score: by which score; None is the distance where the run has one, else the entropy.
        oos_above: the score's threshold; None before `Predictor.resolve`.
        coverage: give the set of labels that holds the right one at this rate, beside the label.
        set_score: by which score of `scalabl.metrics.conformal`.
        per_class: at that rate within each class.
        set_thresholds: of that score, one or one a class; None before `Predictor.resolve`.

    Raises:
        UserError: a value is out of its range, or two of them exclude each other.
    """

    predictive: str | None = None
    samples: int = 10
    seed: int = 0
    sampling: Sampling = PLAIN
    stochastic_layers: str | None = None
    method: str | None = None
    temperature: float | None = None
    abstain: float | None = None
    promise: Promise | None = None
    chosen: str | None = None
    why: str | None = None
    threshold: Threshold | None = None
    scale: float | None = None
    raw: bool = False
    priors: dict[str, float] | None = None
    max_false_alarms: float | None = None
    oos_score: str | None = None
    oos_above: float | None = None
    coverage: float | None = None
    set_score: str = "lac"
    per_class: bool = False
    set_thresholds: tuple[float, ...] | None = None
    feature_variance: float | None = None

    def __post_init__(self) -> None:
        if self.predictive not in (None, *PREDICTIVES):
            raise UserError(f"There is no predictive {self.predictive!r}; choose one of {', '.join(PREDICTIVES)}.")
        if self.samples < 0:
            raise UserError(f"samples is {self.samples}; it must be 0 (the posterior mean) or more.")
        if self.samples == 0 and self.predictive == "linearized":
            raise UserError("samples is 0, the posterior mean, but predictive is linearized; leave out one of the two.")
        if self.method is not None and (self.predictive is not None or self.stochastic_layers is not None):
            raise UserError(f"{self.method} has a predictive of its own; leave out predictive and stochastic_layers.")
        if self.feature_variance is not None and (self.predictive != "linearized" or self.feature_variance < 0):
            raise UserError(
                f"feature_variance is {self.feature_variance}, with the predictive {self.predictive or 'auto'}; it "
                "must be at least 0, and is for linearized alone."
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"The temperature is {self.temperature}; it must be above 0.")
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise UserError(f"The scale of the posterior is {self.scale}; it must be 0 (the mean) or more.")
        if self.priors is not None:
            check_priors(self.priors)
        if self.priors is not None and (self.has_promise or self.is_adaptive):
            one = "adaptive N settles answers" if self.is_adaptive else "a rate is promised"
            raise UserError(f"priors are given, but {one} under those of the run's own rows; leave out one of the two.")
        if self.abstain is not None and self.promise is not None:
            raise UserError("abstain and a promised error rate both say when to answer; give one of them.")
        if self.max_false_alarms is not None and not 0 < self.max_false_alarms < 1:
            raise UserError(f"The share of false alarms is {self.max_false_alarms}; it must lie between 0 and 1.")
        if self.oos_score not in (None, *SCOPE_SCORES):
            raise UserError(f"There is no score of scope {self.oos_score!r}; choose one of {', '.join(SCOPE_SCORES)}.")
        if self.coverage is not None:
            rows_for_coverage(self.coverage)  # refuses a coverage that is none
        if self.set_score not in SET_SCORES:
            raise UserError(f"There is no score of sets {self.set_score!r}; choose one of {', '.join(SET_SCORES)}.")
        self.drawn()  # refuses a threshold that is none

    @property
    def is_adaptive(self) -> bool:
        """Whether rows take different numbers of particles."""
        return self.sampling.confidence is not None

    @property
    def has_promise(self) -> bool:
        """Whether thresholds come from held-out rows: of a promised error rate, of scope, or of sets."""
        return self.promise is not None or self.max_false_alarms is not None or self.coverage is not None

    @property
    def may_abstain(self) -> bool:
        """Whether a row may have no label."""
        return self.abstain is not None or self.promise is not None or self.max_false_alarms is not None

    def drawn(self) -> Sampling:
        """The draws; adaptive N is settled by the threshold that answers are given by."""
        return self.sampling if self.abstain is None else replace(self.sampling, threshold=self.abstain)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinities: a threshold without end is written as a word."""
        values = asdict(self)
        # younger fields: what did not need them is written, compared and hashed as it always was
        values = {k: v for k, v in values.items() if k not in _YOUNGER or v != _YOUNGER[k]}
        if self.threshold is not None and math.isinf(self.threshold.above):
            values["threshold"]["above"] = str(self.threshold.above)
        if self.threshold is not None:
            values["threshold"] = {name: value for name, value in values["threshold"].items() if value is not None}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PredictionSettings:
        """The settings that `to_dict` wrote.

        Raises:
            TypeError, KeyError, ValueError: it did not write these.
        """
        promise, threshold = values["promise"], values["threshold"]
        nested = {
            "sampling": Sampling(**values["sampling"]),
            "promise": promise and Promise(**promise),
            "threshold": threshold and Threshold(**threshold | {"above": float(threshold["above"])}),
        }
        if values.get("set_thresholds") is not None:
            nested["set_thresholds"] = tuple(values["set_thresholds"])
        return cls(**values | nested)
