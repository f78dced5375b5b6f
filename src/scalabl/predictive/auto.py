"""`auto`: the cheapest predictive that keeps the quality of N Monte Carlo particles, and a sentence that says which.

Candidates are Monte Carlo with N particles, the linearised predictive, and the linearised predictive of the fewest top
layers that hold 95 % of the variance of the logits. What each costs is computed, as below. Whether a linearised one may
stand in is measured on a few of the rows that are to be predicted, without their answers: M antithetic pairs of
particles p+, p- give a reference and the variance of one particle,

    reference = 1/M sum_i (p+_i + p-_i) / 2        Var[p] = E[((p+ - p-) / 2)^2] + Var[(p+ + p-) / 2]

and a linearised predictive p_lin passes where it is as near to the reference as the average of N particles is to its
expectation, over all rows and choices:

    gap = sqrt mean (p_lin - reference)^2   <=   noise = sqrt mean Var[p] / N

The gap contains the reference's own error, which is of the even part of p alone, the part that a linearisation lacks:
with large noise the test fails on both accounts. An error of that size in well calibrated probabilities raises the
NLL in second order, as the error of N particles does.

A head may have many classes. Of its linearised predictives the candidate is the one of the fewest K top classes
(`scalabl.predictive.top_classes`) that leave out no more of the epistemic part than N particles are wrong about it.
With d = (log p+ - log p-) / 2 of a pair, u = Var_p d / 2 and u_K the part of it that K classes and a rest leave out,

    sqrt mean_rows (mean_d u_K)^2   <=   sqrt mean_rows Var_d[u] / N

Fewer antithetic or quasi-random particles would average the probabilities as well at less cost. They are no candidates:
they look in fewer directions, so that the epistemic part of the uncertainty is estimated worse.

What each costs is worked out in `scalabl.predictive.cost`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode, holding_variance, top_layers
from scalabl.metrics.uncertainty import average
from scalabl.predictive.base import MeanPredictive, Predictive, predict
from scalabl.predictive.cost import cost_of
from scalabl.predictive.linearized import LinearizedPredictive, logit_covariance, logit_jacobian, summed_variances
from scalabl.predictive.monte_carlo import MonteCarloPredictive, drawn_layers
from scalabl.predictive.sampling import PREDICTIVES
from scalabl.predictive.top_classes import left_out
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.prefix import shared_prefix
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.layers import active_adapters, sequence_classifier, unwrap

TRIAL_ROWS = 8  # on which a linearised predictive is compared; with fewer rows to predict there is no trial
TRIAL_PAIRS = 5
SHARE = 0.95  # of the variance of the logits, that the top layers have to hold


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        predictive: the strategy.
        name: "mc, N = 10", "linearized", "linearized, s in last:3".
        sentence: what, and why.
        costs: of every candidate by its name, in plain forwards of the whole model a batch.
    """

    predictive: Predictive
    name: str
    sentence: str
    costs: dict[str, float]


class AutoPredictive:
    """Chooses on the first rows that it is given, and keeps its choice until the model's weights change.

    Where fewer than `TRIAL_ROWS` rows come before a choice was made, they are predicted by Monte Carlo.

    Args:
        samples: N, whose quality has to be kept; at least 1.
        seed: of the particles.
        stochastic_layers: draw s in the top layers alone, as in the predictives it chooses from.
        scale: tau, as in the predictives it chooses from, which are compared under it.

    Attributes:
        choice: what was chosen, None before the first rows.

    Raises:
        UserError: N is below 1, or there are no such layers.
    """

    name = "auto"
    has_scale = True

    def __init__(
        self, samples: int = 10, *, seed: int = 0, stochastic_layers: str | None = None, scale: float = 1.0
    ) -> None:
        self.samples = samples
        self.seed = seed
        self.stochastic_layers = stochastic_layers
        self.scale = scale
        self.choice: Choice | None = None
        self._mc = MonteCarloPredictive(samples, seed=seed, stochastic_layers=stochastic_layers, scale=scale)
        self._made_for: tuple[object, ...] = ()

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        """Batches come through what was chosen: Monte Carlo where nothing was. `predict` chooses by itself."""
        return (self._mc if self.choice is None else self.choice.predictive)(scorer, batch)

    def chosen(self, scorer: Scorer, rows: Sequence[Encoded], *, batch_size: int = 8) -> Predictive:
        """The predictive of these rows, chosen now or before.

        Raises:
            UserError: the model has no posterior over s, or there are no such layers.
        """
        versions = sum(0 if p.is_inference() else p._version for p in scorer.model.parameters())
        present = (tuple(active_adapters(unwrap(scorer.model))), versions)
        if self.choice is None or present != self._made_for:
            self.choice = self._choose(scorer, rows, batch_size)
            # a choice made of too few rows is made anew
            self._made_for = present if len(rows) >= TRIAL_ROWS else ()
        return self.choice.predictive

    def made(self, name: str, layers: str | None, top: int | None = None) -> Predictive:
        """What this or another process has chosen, by the predictive's name, its layers and its top classes."""
        if self.choice is not None:
            return self.choice.predictive
        return self._mc if name == self._mc.name else self.linearized(layers, top)

    def linearized(self, layers: str | None = None, top: int | None = None) -> LinearizedPredictive:
        """The linearised candidate that draws these layers, of so many top classes or all."""
        return LinearizedPredictive(seed=self.seed, stochastic_layers=layers, scale=self.scale, top_classes=top)

    def _choose(self, scorer: Scorer, rows: Sequence[Encoded], batch_size: int) -> Choice:
        drawn = drawn_layers(scorer.model, self.stochastic_layers)
        if not drawn:
            raise UserError("This adapter has no posterior over s to choose a predictive for; use the mean.")
        start = min(drawn.values())
        prefix = shared_prefix(scorer, rows) if len(rows) >= TRIAL_ROWS else None
        cost = cost_of(scorer, rows, batch_size, 0 if prefix is None else prefix.length)
        sampled, linearized = f"mc, N = {self.samples}", _name(self.stochastic_layers)
        costs = {sampled: cost.mc(self.samples, start), linearized: cost.linearized(start)}
        price = f"{costs[sampled]:.1f} plain forwards a batch"

        def by_mc(why: str) -> Choice:
            return Choice(self._mc, sampled, f"auto chose {sampled} ({price}): {why}.", costs)

        # of a head alone: the choices of a question are few, and not every row has as many
        one_label = scorer.scoring.per_row == 1
        grouped = one_label and cost.classes > 2 and sequence_classifier(scorer.model) is not None
        least = cost.linearized(start, 1) if grouped else costs[linearized]
        if least >= costs[sampled]:
            return by_mc(f"linearised, {cost.classes} choices would take {least:.1f}{' or more' if grouped else ''}")
        if len(rows) < TRIAL_ROWS:
            return by_mc(f"{len(rows)} rows are too few to test the linearised predictive on, it takes {TRIAL_ROWS}")
        few = [rows[i * len(rows) // TRIAL_ROWS] for i in range(TRIAL_ROWS)]
        try:
            trial = _Trial(scorer, few, self, batch_size)
            top = trial.top_classes() if grouped else None
            name = _name(self.stochastic_layers, top)
            costs[name] = cost.linearized(start, top)
            if costs[name] >= costs[sampled]:
                return by_mc(
                    f"linearised, it takes {'all' if top is None else f'{top} of'} the {cost.classes} classes to keep "
                    f"the epistemic part, {costs[name]:.1f}"
                )
            trial.linearize(top)
        except torch.OutOfMemoryError:
            return by_mc(
                f"the backward passes of the linearised predictive do not fit into memory, {batch_size} a batch"
            )
        layers, gap = self.stochastic_layers, trial.gap(drawn)
        if gap > trial.noise:
            return by_mc(
                f"on {TRIAL_ROWS} of the rows the linearised predictive ({costs[name]:.1f}) is {gap:.2g} off in "
                f"probability, more than the noise of N = {self.samples}, {trial.noise:.2g}"
            )
        if layers is None:
            spec = holding_variance(drawn, trial.variances(), SHARE)
            fewer = {name: drawn[name] for name in top_layers(drawn, spec)}
            if len(fewer) < len(drawn):
                costs[_name(spec, top)] = cost.linearized(min(fewer.values()), top)
                if trial.gap(fewer) <= trial.noise:
                    layers, gap = spec, trial.gap(fewer)
        name = _name(layers, top)
        return Choice(
            self.linearized(layers, top),
            name,
            f"auto chose {name} ({costs[name]:.1f} plain forwards a batch; mc with N = {self.samples} takes "
            f"{costs[sampled]:.1f}): on {TRIAL_ROWS} of the rows it is {gap:.2g} off in probability, no more than the "
            f"noise of N = {self.samples}, {trial.noise:.2g}{'' if top is None else trial.says_of(top)}.",
            costs,
        )


def _name(layers: str | None, top: int | None = None) -> str:
    classes = "" if top is None else f", top {top} of the classes"
    return f"linearized{classes}" + ("" if layers is None else f", s in {layers}")


class _Trial:
    """Antithetic pairs of particles and the Jacobians of some rows.

    Attributes:
        noise: RMSE over rows and choices of the averaged probabilities of N independent particles.
    """

    def __init__(self, scorer: Scorer, rows: Sequence[Encoded], auto: AutoPredictive, batch_size: int) -> None:
        pairs = MonteCarloPredictive(
            2 * TRIAL_PAIRS, seed=auto.seed, draws="antithetic", stochastic_layers=auto.stochastic_layers,
            scale=auto.scale,
        )  # fmt: skip
        log_probs = predict(scorer, rows, pairs, batch_size=batch_size).double()
        self._present = (log_probs > -torch.inf).any(dim=0)  # choices that a row has
        self._reference, variance = reference_and_variance(log_probs.exp())
        self.noise = float((variance[self._present].mean() / auto.samples).sqrt())
        self._deviations = (log_probs[0::2] - log_probs[1::2]) / 2  # (M, n, C)
        self._scorer, self._rows, self._auto, self._batch_size = scorer, rows, auto, batch_size
        self._linear = auto.linearized()
        self._parts: list[tuple[list[int], Tensor, dict[str, Tensor]]] = []

    def top_classes(self) -> int | None:
        """The fewest top classes that keep the epistemic part as well as N particles; None where it takes all."""
        classes = self._reference.shape[-1]
        return next((top for top in range(1, classes - 1) if self._left_out(top) <= self._epistemic_noise), None)

    def says_of(self, top: int) -> str:
        """What so many classes leave out, for a sentence."""
        return (
            f", and the other classes together leave out {self._left_out(top):.2g} nats of the epistemic part, whose "
            f"noise is {self._epistemic_noise:.2g}"
        )

    def _left_out(self, top: int) -> float:
        """RMS over rows of the epistemic part that is left out, in nats."""
        return float(left_out(self._reference, self._deviations, top)[0].mean(dim=0).square().mean().sqrt())

    @cached_property
    def _epistemic_noise(self) -> float:
        """RMSE over rows of the epistemic part of N particles, in nats."""
        _, whole = left_out(self._reference, self._deviations, 1)
        return float((whole.var(dim=0).mean() / self._auto.samples).sqrt())

    def linearize(self, top: int | None) -> None:
        """Compute the Jacobians of so many top classes, or of all."""
        scorer = self._scorer
        with eval_mode(scorer.model):
            for indices, chunk in scorer.batches(self._rows, self._batch_size):
                batch = scorer.with_trunk(scorer.scoring.collate(chunk).to(scorer.device))
                self._parts.append((indices, *logit_jacobian(scorer, batch, self._auto.stochastic_layers, top)))

    def gap(self, layers: dict[str, int]) -> float:
        """RMSE over rows and choices of the predictive that is linearised in these layers, to the reference."""
        found = torch.zeros_like(self._reference)
        for indices, logits, jacobians in self._parts:
            covariance = logit_covariance(self._scorer, {name: jacobians[name] for name in layers})
            likelihood = self._scorer.scoring.likelihood
            log_probs = self._linear.log_probs(logits, covariance, likelihood)
            probs = average(likelihood.questions(log_probs)).reshape(len(indices), -1)
            found[torch.tensor(indices), : probs.shape[1]] = probs
        return float((found - self._reference)[self._present].square().mean().sqrt())

    def variances(self) -> dict[str, float]:
        """Each layer's part of the variance of the logits' differences, summed over the rows."""
        return summed_variances(self._scorer.model, (jacobians for _, _, jacobians in self._parts))


def reference_and_variance(particles: Tensor) -> tuple[Tensor, Tensor]:
    """The average of antithetic pairs, and the variance of one particle.

    Args:
        particles: (2 M, n, C) probabilities; 2 i and 2 i + 1 are a pair.

    Returns:
        both (n, C); the variance is unbiased.
    """
    pairs = particles.unflatten(0, (-1, 2))
    even = pairs.mean(dim=1)
    odd = (pairs[:, 0] - pairs[:, 1]) / 2
    return even.mean(dim=0), odd.square().mean(dim=0) + even.var(dim=0)


def with_scale(predictive: Predictive, scale: float) -> Predictive:
    """The same predictive with the posterior's standard deviations times tau; the mean has none, and is what `auto`
    is at tau = 0.

    Raises:
        UserError: its particles are not of a posterior.
    """
    if scale == 1 or isinstance(predictive, MeanPredictive):
        return predictive
    if not getattr(predictive, "has_scale", False):
        raise UserError(f"{predictive.name} has no posterior whose scale could be {scale:g}; leave it out.")
    if isinstance(predictive, AutoPredictive):
        if scale == 0:
            return MeanPredictive()
        return AutoPredictive(
            predictive.samples, seed=predictive.seed, stochastic_layers=predictive.stochastic_layers, scale=scale
        )
    made: Any = copy.copy(predictive)
    made.scale = scale
    return made  # type: ignore[no-any-return]


def make_predictive(name: str, *, samples: int = 10, seed: int = 0) -> Predictive:
    """The predictive of that name."""
    if name == "mean":
        return MeanPredictive()
    if name == "mc":
        return MonteCarloPredictive(samples, seed=seed)
    if name == "linearized":
        return LinearizedPredictive(seed=seed)
    if name == "auto":
        return AutoPredictive(samples, seed=seed)
    raise UserError(f"There is no predictive {name!r}; choose one of {', '.join(PREDICTIVES)}.")
