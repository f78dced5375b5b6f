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
from dataclasses import asdict, astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

from scalabl.inference.promise import Promise
from scalabl.metrics.selective import Threshold
from scalabl.predictive.sampling import PLAIN, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.data.example import Example
    from scalabl.runs.method import Run
    from scalabl.scoring.base import Encoded
    from scalabl.scoring.prefix import SharedPrefix


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

    def as_list(self) -> list[Any]:
        """Plain values, without the promise."""
        return [self.predictive or "auto", self.samples, self.seed, astuple(self.drawn()), self.stochastic_layers]

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


def decide(run: Run, asked: Asked, rows: Sequence[Example], *, batch_size: int = 8) -> Decision:
    """Choose the predictive of these rows and of those to come; the threshold is `promised`'s.

    Raises:
        UserError: settings that the run does not have, or rows that its scoring cannot encode.
    """
    from scalabl.inference.evaluation import choose, describe_method, make_strategy

    strategy = make_strategy(
        run,
        asked.predictive,
        samples=asked.samples,
        seed=asked.seed,
        sampling=asked.drawn(),
        stochastic_layers=asked.stochastic_layers,
    )
    strategy, why = choose(run, strategy, rows, batch_size=batch_size)
    drawing = getattr(strategy, "inner", strategy)
    layers = getattr(drawing, "stochastic_layers", None)
    if not why:
        return Decision(asked.predictive, layers)
    return Decision(strategy.name, layers, name=describe_method(run, strategy), why=why[0])


def promised(run: Run, asked: Asked, decision: Decision, *, batch_size: int = 8) -> Decision:
    """The decision with the threshold that keeps the promise, if there is one.

    Raises:
        UserError: the run's held-out rows cannot be had.
    """
    from scalabl.inference.evaluation import threshold_of

    if asked.promise is None:
        return decision
    strategy = Answering(run, asked, decision).strategy
    return replace(decision, threshold=threshold_of(run, asked.promise, strategy, batch_size=batch_size))


class Answering:
    """A loaded run that answers rows under a decision.

    Args:
        run: the run.
        asked: what was asked of it.
        decision: made for these settings, by this process or another.
    """

    def __init__(self, run: Run, asked: Asked, decision: Decision) -> None:
        from scalabl.inference.evaluation import make_strategy

        self.run = run
        self.asked = asked
        self.decision = decision
        self.strategy = make_strategy(
            run,
            decision.predictive,
            samples=asked.samples,
            seed=asked.seed,
            sampling=asked.drawn(),
            stochastic_layers=decision.stochastic_layers,
        )

    def prefix(self, encoded: Sequence[Encoded]) -> SharedPrefix | None:
        """What rows begin with, for calls that see a few of them at a time; None where the predictive has no use."""
        from scalabl.scoring.prefix import shared_prefix

        return shared_prefix(self.run.scorer, encoded) if getattr(self.strategy, "shares_prefix", False) else None

    def answers(
        self,
        rows: Sequence[Example],
        encoded: Sequence[Encoded],
        *,
        batch_size: int = 8,
        prefix: SharedPrefix | None = None,
    ) -> Iterator[dict[str, Any]]:
        """One answer a row: id, label, probs (choice -> probability), confidence, entropy, aleatoric, epistemic (nats).

        Under adaptive N also `particles`, how many the answer is averaged over; where auto chose, `predictive`.

        Args:
            rows: n questions.
            encoded: the same as tokens.
            batch_size: rows at a time; the answers do not depend on it.
            prefix: what the rows begin with; None looks for it in these rows.
        """
        from scalabl.metrics.uncertainty import average, decompose, particles_used
        from scalabl.predictive.over_ranks import predict as predict_rows

        log_probs = predict_rows(self.run.scorer, encoded, self.strategy, batch_size=batch_size, prefix=prefix)
        probs, uncertainty, used = average(log_probs), decompose(log_probs), particles_used(log_probs)
        given = self._given(log_probs)
        for i, row in enumerate(rows):
            of_row = probs[i, : len(row.choices)].tolist()
            confidence = max(of_row)
            yield {
                "id": row.id,
                "label": row.choices[of_row.index(confidence)] if given[i] else None,
                "probs": dict(zip(row.choices, of_row, strict=True)),
                "confidence": confidence,
                "entropy": uncertainty.total[i].item(),
                "aleatoric": uncertainty.aleatoric[i].item(),
                "epistemic": uncertainty.epistemic[i].item(),
                **({"particles": int(used[i])} if self.asked.adaptive else {}),
                **({"predictive": self.decision.name} if self.decision.name is not None else {}),
            }

    def _given(self, log_probs: Tensor) -> list[bool]:
        """Whether each of n rows is answered; log_probs (N, n, C)."""
        from scalabl.metrics.uncertainty import average

        if self.asked.promise is not None and self.decision.threshold is not None:
            return [bool(given) for given in self.asked.promise.answered(self.decision.threshold, log_probs)]
        return [highest >= (self.asked.abstain or 0.0) for highest in average(log_probs).amax(dim=1).tolist()]
