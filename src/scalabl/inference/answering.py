"""How a run's rows become answers: what is asked of it, what is decided once for all rows, and the answers.

One process and many go through the same three steps, so that they answer alike:

    Asked        what the user wants
    Decision     what follows from it for these rows: the predictive that auto takes, the layers that "variance:0.9"
                 means, the threshold that keeps a promise; made once, plain values that can be written and passed on
    Answering    a loaded run under a decision: rows in, answers out
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from scalabl.inference.promise import Promise
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.selective import Threshold
from scalabl.predictive.sampling import PLAIN, Sampling

if TYPE_CHECKING:
    from scalabl.data.example import Example
    from scalabl.runs.method import Run
    from scalabl.scoring.base import Encoded


@dataclass(frozen=True)
class Asked:
    """Settings of a prediction that decide its answers.

    Attributes:
        predictive: "mean", "mc", "linearized" or "auto"; None is what the record says, else auto.
        samples: N of mc.
        seed: of the particles.
        sampling: the kind of draws, and adaptive N; the threshold of adaptive N is `abstain`.
        stochastic_layers: draw s in these alone, as in `Run.predictive`.
        abstain: answer null where the highest probability is below this.
        promise: answer null where an answer would break it.
    """

    predictive: str | None = None
    samples: int = 10
    seed: int = 0
    sampling: Sampling = PLAIN
    stochastic_layers: str | None = None
    abstain: float | None = None
    promise: Promise | None = None

    def drawn(self) -> Sampling:
        """The draws, settled by the threshold that answers are given by."""
        return replace(self.sampling, threshold=self.abstain)

    @property
    def adaptive(self) -> bool:
        return self.sampling.confidence is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self) | {"predictive": self.predictive or "auto"}


@dataclass(frozen=True)
class Decision:
    """What is decided once and holds for every row.

    Attributes:
        predictive: "mean", "mc", "linearized", or as asked where the run's own record decides.
        stochastic_layers: the "last:K" in which s is drawn; None is every layer.
        name: of what auto chose, written into every answer; None where it did not choose.
        why: its sentence.
        threshold: keeps the promise; None where nothing is promised.
    """

    predictive: str | None
    stochastic_layers: str | None
    name: str | None = None
    why: str | None = None
    threshold: Threshold | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values; JSON has no infinities, which are written as words."""
        made = asdict(self)
        if made["threshold"] is not None and math.isinf(made["threshold"]["above"]):
            made["threshold"]["above"] = str(made["threshold"]["above"])
        return made

    @classmethod
    def from_dict(cls, made: dict[str, Any]) -> Decision:
        """The decision that `as_dict` wrote."""
        threshold = made["threshold"]
        if threshold is not None:
            threshold = Threshold(**threshold | {"above": float(threshold["above"])})
        return cls(**made | {"threshold": threshold})


def settings_of(asked: Asked, decision: Decision | None) -> PredictionSettings:
    """Both as one object."""
    asked_for = {name: getattr(asked, name) for name in Asked.__dataclass_fields__}
    if decision is None:
        return PredictionSettings(**asked_for)
    made = {"predictive": decision.predictive, "stochastic_layers": decision.stochastic_layers}
    why = {"chosen": decision.name, "why": decision.why, "threshold": decision.threshold}
    return PredictionSettings(**{**asked_for, **made, **why})


def decide(run: Run, asked: Asked, rows: Sequence[Example], *, batch_size: int = 8) -> Decision:
    """What is chosen once for these rows and those to come, but for the threshold, which is `promised`'s."""
    from scalabl.inference.predictor import Predictor

    settings = replace(settings_of(asked, None), promise=None)
    found = Predictor(run, settings, batch_size=batch_size).resolve(rows)
    return Decision(found.predictive, found.stochastic_layers, found.chosen, found.why)


def promised(run: Run, asked: Asked, decision: Decision, *, batch_size: int = 8) -> Decision:
    """The decision with the threshold that keeps the promise, if there is one."""
    from scalabl.inference.predictor import Predictor

    found = Predictor(run, settings_of(asked, decision), batch_size=batch_size).resolve()
    return replace(decision, threshold=found.threshold)


class Answering:
    """A loaded run that answers rows under a decision."""

    def __init__(self, run: Run, asked: Asked, decision: Decision) -> None:
        from scalabl.inference.predictor import Predictor

        self.predictor = Predictor(run, settings_of(asked, decision))

    def answers(
        self, rows: Sequence[Example], encoded: Sequence[Encoded], *, batch_size: int = 8
    ) -> Iterator[dict[str, Any]]:
        """As `Predictor.answers`."""
        self.predictor.batch_size = batch_size
        return self.predictor.answers(rows, encoded)
