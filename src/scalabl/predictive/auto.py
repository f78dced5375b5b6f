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

A head may have many classes. Its first candidate takes one backward pass for any number of them
(`scalabl.predictive.head_features`); its one number alpha is that of the pairs' deviations d = (log p+ - log p-) / 2.
Since it takes the variance of most logits from the head's weights alone, its epistemic part is tested too, beside the
pairs' u = Var_p d / 2 (to second order), whose own error is that of M, with the same functional u_lin of its points:

    sqrt mean_rows (u_lin - mean_d u)^2   <=   1.2 sqrt mean_rows [Var_d[u] (1 / N + 1 / M) + (mean_d u / N)^2]

where the last term is what N particles' own epistemic part is too small by, and 1.2 allows for few rows and pairs.

Fewer antithetic or quasi-random particles would average the probabilities as well at less cost. They are no candidates:
they look in fewer directions, so that the epistemic part of the uncertainty is estimated worse.

What each costs is worked out in `scalabl.predictive.cost`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode, holding_variance, top_layers
from scalabl.metrics.uncertainty import average
from scalabl.predictive.base import MeanPredictive, Predictive, predict
from scalabl.predictive.cost import Cost, cost_of
from scalabl.predictive.head_features import feature_variance, half_variance, head_weight, root_of
from scalabl.predictive.linearized import LinearizedPredictive, summed_variances
from scalabl.predictive.monte_carlo import MonteCarloPredictive, drawn_layers
from scalabl.predictive.sampling import PREDICTIVES
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.prefix import shared_prefix
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.layers import active_adapters, unwrap

BATCH = 8  # rows a batch that costs are compared for, whatever the batches are: answers do not depend on their size
TRIAL_ROWS = 8  # on which a linearised predictive is compared; with fewer rows to predict there is no trial
TRIAL_PAIRS = 5
HEAD_ROWS, HEAD_PAIRS = 32, 8  # of a head, at most: its epistemic part is compared too, which varies more
MARGIN = 1.2  # of the epistemic test, whose figures are of few rows and pairs
SHARE = 0.95  # of the variance of the logits, that the top layers have to hold


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        predictive: the strategy.
        name: "mc, N = 10", "linearized", "linearized, one contrast", "linearized, s in last:3".
        sentence: what, and why.
        costs: of every candidate by its name, in plain forwards of the whole model a batch of `BATCH` rows.
        refused: candidates that were tried and are too far from the average over particles, by name.
    """

    predictive: Predictive
    name: str
    sentence: str
    costs: dict[str, float]
    refused: dict[str, Predictive] = field(default_factory=dict)


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

    def made(self, name: str, layers: str | None, features: float | None = None) -> Predictive:
        """What this or another process has chosen, by the predictive's name, its layers and its `feature_variance`."""
        if self.choice is not None:
            return self.choice.predictive
        return self._mc if name == self._mc.name else self.linearized(layers, features)

    def linearized(self, layers: str | None = None, features: float | None = None) -> LinearizedPredictive:
        """The linearised candidate that draws these layers; of a head's features, or of all classes."""
        return LinearizedPredictive(
            seed=self.seed, stochastic_layers=layers, scale=self.scale, feature_variance=features
        )

    def _choose(self, scorer: Scorer, rows: Sequence[Encoded], batch_size: int) -> Choice:
        drawn = drawn_layers(scorer.model, self.stochastic_layers)
        if not drawn:
            raise UserError("This adapter has no posterior over s to choose a predictive for; use the mean.")
        start = min(drawn.values())
        prefix = shared_prefix(scorer, rows) if len(rows) >= TRIAL_ROWS else None
        cost = cost_of(scorer, rows, BATCH, 0 if prefix is None else prefix.length)
        sampled, linearized = f"mc, N = {self.samples}", _name(self.stochastic_layers)
        costs = {sampled: cost.mc(self.samples, start), linearized: cost.linearized(start)}
        price = f"{costs[sampled]:.1f} plain forwards a batch"
        refused: dict[str, Predictive] = {}

        def by_mc(why: str) -> Choice:
            return Choice(self._mc, sampled, f"auto chose {sampled} ({price}): {why}.", costs, refused)

        # of a head alone: logits of choices have no weights of their own
        weight = head_weight(scorer.model) if scorer.scoring.per_row == 1 and cost.classes > 2 else None
        if weight is not None:
            costs[_name(self.stochastic_layers, of_features=True)] = cost.linearized(start, 1)
        least = min(taken for name, taken in costs.items() if name != sampled)
        if least >= costs[sampled]:
            return by_mc(f"linearised, {cost.classes} choices would take {least:.1f}")
        if len(rows) < TRIAL_ROWS:
            return by_mc(f"{len(rows)} rows are too few to test the linearised predictive on, it takes {TRIAL_ROWS}")
        number, pairs = (TRIAL_ROWS, TRIAL_PAIRS) if weight is None else (min(HEAD_ROWS, len(rows)), HEAD_PAIRS)
        few = [rows[i * len(rows) // number] for i in range(number)]
        try:
            trial = _Trial(scorer, few, self, pairs, batch_size)
            why = ""
            for features in (None,) if weight is None else (trial.feature_variance(weight), None):
                name = _name(self.stochastic_layers, of_features=features is not None)
                if costs[name] >= costs[sampled]:
                    break
                trial.linearize(features)
                fault = trial.fault(drawn)
                if fault is None:
                    return self._linearized(trial, cost, drawn, costs)
                refused[name] = self.linearized(self.stochastic_layers, features)
                why = f"on {number} of the rows the {name} predictive ({costs[name]:.1f}) is {fault}"
        except torch.OutOfMemoryError:
            return by_mc(
                f"the backward passes of the linearised predictive do not fit into memory, {batch_size} a batch"
            )
        return by_mc(why)

    def _linearized(self, trial: _Trial, cost: Cost, drawn: dict[str, int], costs: dict[str, float]) -> Choice:
        """The linearised predictive that the trial holds, of fewer layers where these do as well."""
        layers, kept, features = self.stochastic_layers, drawn, trial.linear.feature_variance
        if layers is None:
            spec = holding_variance(drawn, trial.variances(), SHARE)
            fewer = {name: drawn[name] for name in top_layers(drawn, spec)}
            if len(fewer) < len(drawn):
                of_fewer = _name(spec, of_features=features is not None)
                costs[of_fewer] = cost.linearized(min(fewer.values()), None if features is None else 1)
                if trial.fault(fewer) is None:
                    layers, kept = spec, fewer
        name = _name(layers, of_features=features is not None)
        epistemic = "" if features is None else f", and {trial.epistemic_gap(kept):.2g} nats off in the epistemic part"
        return Choice(
            self.linearized(layers, features),
            name,
            f"auto chose {name} ({costs[name]:.1f} plain forwards a batch; mc with N = {self.samples} takes "
            f"{costs[f'mc, N = {self.samples}']:.1f}): on {trial.rows} of the rows it is {trial.gap(kept):.2g} off in "
            f"probability, no more than the noise of N = {self.samples}, {trial.noise:.2g}{epistemic}.",
            costs,
        )


def _name(layers: str | None, of_features: bool = False) -> str:
    return f"linearized{', one contrast' * of_features}" + ("" if layers is None else f", s in {layers}")


class _Trial:
    """Antithetic pairs of particles and the Jacobians of some rows.

    Attributes:
        noise: RMSE over rows and choices of the averaged probabilities of N independent particles.
    """

    def __init__(
        self, scorer: Scorer, rows: Sequence[Encoded], auto: AutoPredictive, number: int, batch_size: int
    ) -> None:
        pairs = MonteCarloPredictive(
            2 * number, seed=auto.seed, draws="antithetic", stochastic_layers=auto.stochastic_layers,
            scale=auto.scale,
        )  # fmt: skip
        log_probs = predict(scorer, rows, pairs, batch_size=batch_size).double()
        self._present = (log_probs > -torch.inf).any(dim=0)  # choices that a row has
        self._reference, variance = reference_and_variance(log_probs.exp())
        self.noise = float((variance[self._present].mean() / auto.samples).sqrt())
        self._deviations = (log_probs[0::2] - log_probs[1::2]) / 2  # (M, n, C)
        self._scorer, self._rows, self._auto, self._batch_size = scorer, rows, auto, batch_size
        self.rows = len(rows)
        self.linear = auto.linearized()
        self._parts: list[tuple[list[int], Tensor, dict[str, Tensor]]] = []

    def feature_variance(self, weight: Tensor) -> float:
        """alpha of a head's weights, at tau = 1."""
        return feature_variance(root_of(weight).cpu(), self._deviations) / self._auto.scale**2

    def linearize(self, features: float | None) -> None:
        """Compute the Jacobians of a candidate: of a head's features, or of all classes."""
        scorer = self._scorer
        self.linear, self._parts = self._auto.linearized(self._auto.stochastic_layers, features), []
        with eval_mode(scorer.model):
            for indices, batch in scorer.encoded_batches(self._rows, self._batch_size):
                self._parts.append((indices, *self.linear.jacobian(scorer, batch)))

    def fault(self, layers: dict[str, int]) -> str | None:
        """Why the candidate that is linearised in these layers may not stand in; None where it may."""
        gap, samples = self.gap(layers), self._auto.samples
        if gap > self.noise:
            return f"{gap:.2g} off in probability, more than the noise of N = {samples}, {self.noise:.2g}"
        if self.linear.feature_variance is not None and (gap := self.epistemic_gap(layers)) > self.epistemic_noise:
            return (
                f"{gap:.2g} nats off in the epistemic part, more than the noise of N = {samples} and of the trial, "
                f"{self.epistemic_noise:.2g}"
            )
        return None

    def gap(self, layers: dict[str, int]) -> float:
        """RMSE over rows and choices of the predictive that is linearised in these layers, to the reference."""
        found = torch.zeros_like(self._reference)
        likelihood = self._scorer.scoring.likelihood
        for indices, _, log_probs in self._log_probs(layers):
            probs = average(likelihood.questions(log_probs)).reshape(len(indices), -1)
            found[torch.tensor(indices), : probs.shape[1]] = probs
        return float((found - self._reference)[self._present].square().mean().sqrt())

    def epistemic_gap(self, layers: dict[str, int]) -> float:
        """RMSE over rows of its epistemic part, in nats, to that of the pairs."""
        found = torch.zeros_like(self._reference[:, 0])
        for indices, logits, log_probs in self._log_probs(layers):
            deviations = (log_probs - logits).double().cpu()
            found[torch.tensor(indices)] = half_variance(self._reference[indices], deviations).mean(dim=0)
        return float((found - half_variance(self._reference, self._deviations).mean(dim=0)).square().mean().sqrt())

    @cached_property
    def epistemic_noise(self) -> float:
        """What RMSE over rows of the epistemic parts of N particles and of the pairs is let pass, in nats."""
        of_pair, samples = half_variance(self._reference, self._deviations), self._auto.samples
        noise = of_pair.var(dim=0) * (1 / samples + 1 / len(of_pair)) + (of_pair.mean(dim=0) / samples).square()
        return MARGIN * float(noise.mean().sqrt())

    def _log_probs(self, layers: dict[str, int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Rows, their logits at the posterior mean, and log probabilities of the points."""
        for indices, logits, jacobians in self._parts:
            of_layers = {name: jacobians[name] for name in layers}
            yield indices, logits, self.linear.of_jacobian(self._scorer, logits, of_layers)

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
