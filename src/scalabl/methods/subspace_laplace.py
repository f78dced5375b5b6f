"""ScalaBL after training: the exact joint Laplace posterior of the r numbers s of all layers of a finished LoRA.

    B A = U diag(sv) V^T,   s ~ N(1, (H + precision I)^-1),   H = sum_n J_n^T Lambda_n J_n over all s jointly
    f(x) ~ N(f_LoRA(x), J (H + precision I)^-1 J^T),   p(y | x) = E[softmax f(x)]           [Immer et al. 2021]

What it rests on is in `scalabl.training.posthoc`; this fits it on a run and keeps it beside the run's adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from scalabl.data.example import Example
from scalabl.methods.saved import SavedMethod
from scalabl.posterior.joint import JointGaussian, Kept, Structure
from scalabl.predictive.base import Predictive
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.runs.method import Run
from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer
from scalabl.training.posthoc.laplace import fit_laplace
from scalabl.training.posthoc.svd import Factors, StochasticLeaves, factors_of


class SubspaceLaplace(SavedMethod):
    """One pass over the training rows, and one over the validation rows, which choose the prior's precision."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The curvature over the training rows, and the prior precision of the lowest NLL of the validation rows; of
        the highest evidence without any, as `bayesianize` has it.

        Raises:
            UserError: no training rows, or the run is no plain LoRA.
        """
        encoded = self.encoded(run, train_rows, batch_size=batch_size)
        held_out = self.encoded(run, validation_rows, batch_size=batch_size) if validation_rows else []
        leaves = StochasticLeaves(factors_of(run.scorer.model))
        with leaves.in_place(run.scorer.model):
            joint, facts = fit_laplace(run.scorer, encoded, held_out, batch_size=batch_size)
        facts |= {"ranks": dict(joint.ranks), "variational_numbers": joint.size * (joint.size + 3) // 2}
        # the factors too: singular vectors of like values may turn out otherwise on another machine
        tensors = {f"{name}|{part}": tensor for name, f in leaves.factors.items() for part, tensor in vars(f).items()}
        return self.save(run, facts, {**tensors, "factor": joint.factor})

    def predictive(
        self,
        run: Run,
        *,
        samples: int = 10,
        seed: int = 0,
        kind: Literal["linearized", "mc"] = "linearized",
        structure: Structure = "joint",
        kept: Kept = "marginal",
    ) -> Predictive:
        """The linearised predictive; or an average over N draws of s, and without some of the correlations."""
        facts, tensors = self.facts(run), self.tensors(run)
        joint = JointGaussian(tensors["factor"], facts["ranks"]).restricted(structure, kept)
        factors = {name: Factors(tensors[f"{name}|rows"], tensors[f"{name}|up"]) for name in facts["ranks"]}
        inner = LinearizedPredictive(seed=seed) if kind == "linearized" else MonteCarloPredictive(samples, seed=seed)
        return _InPlace(StochasticLeaves(factors, joint), inner)

    def extra_numbers(self, run: Run, facts: dict[str, Any], saved: int) -> int:
        return int(facts["variational_numbers"])  # A and B are the run's own, in other factors


class _InPlace:
    """A predictive of s on a model that is a plain LoRA before and after."""

    def __init__(self, leaves: StochasticLeaves, inner: Predictive) -> None:
        self.leaves = leaves
        self.inner = inner
        self.name = inner.name

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        with self.leaves.in_place(scorer.model):
            return self.inner(scorer, batch)
