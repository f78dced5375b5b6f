"""The linearised predictive: logits Gaussian in s, from one forward pass and C - 1 backward passes to s alone; of more
than 26 classes 25, for the most probable ones beside the rest; or one, for a head's difference of logits that matters
most.

    f(x, s) ~ f(x, s_mu) + J (s - s_mu),   J = df/ds at s_mu    =>    f(x, s) ~ N(f(x, s_mu), J Sigma J^T)

[Immer et al. 2021, 2008.08400, eq. of the GLM predictive; here with respect to the r numbers of each layer only.]
The softmax of that Gaussian is averaged over (quasi-)Monte Carlo points: its cost does not grow with the model. Of
several labels a row it is the sigmoid of each logit, from C backward passes.

How much of the variance of f comes from each layer's s is the same sum layer by layer,

    Cov[f(x)] ~ sum_l J_l Sigma_l J_l^T

where f are the differences of the class logits to the first one's. Correlations between layers, where a joint
covariance has them, belong to no layer and are left out.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.core.modules import check_spec, eval_mode
from scalabl.posterior.draws import standard_normal
from scalabl.predictive.head_features import HeadFeatures, head_weight, root_of
from scalabl.predictive.monte_carlo import drawn_layers
from scalabl.predictive.top_classes import TOP_CLASSES, Groups
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.likelihood import Likelihood, OneLabel
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.joint import joint_of
from scalabl.tuner.layers import stochastic_layers
from scalabl.tuner.state import only, values

# dimensions of the Sobol sequence; in many more its few points lie no better than random ones
_SOBOL = 25


class LinearizedPredictive:
    """Logit draws of the linearised model: (points, B, C) log class probabilities.

    Args:
        points: quasi-Monte Carlo points of the softmax-Gaussian integral; a power of two is best.
        seed: scrambles the points.
        stochastic_layers: the top layers alone are uncertain, "last:K" or a fraction "last:0.25", the others known.
        scale: tau, by which the posterior's standard deviations are multiplied: tau^2 J Sigma J^T.
        top_classes: K, so many of a row's classes are uncertain each on its own, the others as one
            (`scalabl.predictive.top_classes`), which takes K backward passes; C - 1 or more are all classes, and None
            is TOP_CLASSES of one label out of many, and all of several labels.
        feature_variance: alpha, the variance in every direction of the features that a head reads, at tau = 1: all but
            one difference of the logits are as uncertain as that makes them (`scalabl.predictive.head_features`),
            which takes one backward pass; None where each is as the posterior makes it.

    Raises:
        UserError: points or top_classes is below 1, feature_variance is below 0 or beside top_classes, or there are no
            such layers.
    """

    name = "linearized"
    has_scale = True

    def __init__(
        self,
        points: int = 128,
        *,
        seed: int = 0,
        stochastic_layers: str | None = None,
        scale: float = 1.0,
        top_classes: int | None = None,
        feature_variance: float | None = None,
    ) -> None:
        if points < 1:
            raise UserError(f"points is {points}; it must be at least 1.")
        self.points = points
        self.seed = seed
        if stochastic_layers is not None:
            check_spec(stochastic_layers)
        self.stochastic_layers = stochastic_layers
        self.scale = scale
        if top_classes is not None and top_classes < 1:
            raise UserError(f"top_classes is {top_classes}; it must be at least 1.")
        self.top_classes = top_classes
        if feature_variance is not None and not (feature_variance >= 0 and top_classes is None):
            raise UserError(
                f"feature_variance is {feature_variance}; it must be 0 or more, and top_classes left out beside it."
            )
        self.feature_variance = feature_variance
        self._root: tuple[tuple[int, int], Tensor] | None = None  # of a head's weight in its present version
        self._kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    def keeping(self) -> LinearizedPredictive:
        """The same, which keeps the Gaussian of every batch for when it comes again: of its copies of another scale
        too, as the Gaussian is that at tau = 1. For as long as the model stays what it is."""
        made = copy.copy(self)
        made._kept = {}
        return made

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        if self._kept is None or batch.images is not None:  # the same tokens stand for other images
            return self.of_jacobian(scorer, *self.jacobian(scorer, batch))
        read = batch.input_ids, batch.position_ids, batch.segments, batch.token_types
        key = tuple(x if x is None else (x.shape, x.cpu().numpy().tobytes()) for x in read)
        if key not in self._kept:
            logits, jacobians = self.jacobian(scorer, batch)
            self._kept[key] = logits, logit_covariance(scorer, jacobians)
        return self._of_gaussian(scorer, *self._kept[key])

    def jacobian(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits (B, C), and the Jacobians by layer of those differences of them that are differentiated."""
        top, likelihood = self.top_classes, scorer.scoring.likelihood
        few = top is not None or self.feature_variance is not None
        if few and not isinstance(likelihood, OneLabel):
            which = "feature_variance" if top is None else "top_classes"
            raise UserError(f"{which} is of one label out of many, and here rows have several; leave it out.")

        def contrasts(logits: Tensor) -> list[Tensor]:
            if self.feature_variance is not None:
                return [self._features(scorer, logits).contrast]
            limit = TOP_CLASSES if top is None else top
            if isinstance(likelihood, OneLabel) and limit < logits.shape[1] - 1:
                return list(Groups.of(logits, limit).contrasts.unbind(dim=1))
            return likelihood.contrasts(logits, batch.num_choices)

        return logit_jacobian(scorer, batch, self.stochastic_layers, contrasts)

    def of_jacobian(self, scorer: Scorer, logits: Tensor, jacobians: dict[str, Tensor]) -> Tensor:
        """(points, B, C) log class probabilities; of those layers alone that have a Jacobian."""
        return self._of_gaussian(scorer, logits, logit_covariance(scorer, jacobians))

    def _of_gaussian(self, scorer: Scorer, logits: Tensor, covariance: Tensor) -> Tensor:
        if self.feature_variance is None:
            return self.log_probs(logits, covariance, scorer.scoring.likelihood)
        features = self._features(scorer, logits)
        noise = gaussian_points(self.points, features.root.shape[1], self.seed).to(logits)
        return (logits + self.scale * features.shift(covariance[:, 0, 0], noise)).log_softmax(dim=-1)

    def _features(self, scorer: Scorer, logits: Tensor) -> HeadFeatures:
        weight = head_weight(scorer.model)
        if weight is None or self.feature_variance is None:
            raise UserError("feature_variance is of a classification head, and this model has none; leave it out.")
        key = (id(weight), weight._version)
        if self._root is None or self._root[0] != key:
            self._root = key, root_of(weight)
        return HeadFeatures(self.feature_variance**0.5 * self._root[1], logits)

    def log_probs(self, mean: Tensor, covariance: Tensor, likelihood: Likelihood | None = None) -> Tensor:
        """The probabilities of Gaussian logits at the points: (points, B, C), or (points, B, 2 C) of several labels.

        Args:
            mean: (B, C), -inf where a row has no such choice.
            covariance: (B, C - 1, C - 1) of the differences to the first, at tau = 1; or (B, K, K) of the groups of
                K < C - 1 top classes; or (B, C, C) of the logits of several labels.
            likelihood: what they are the logits of; one label if left out.
        """
        contrasts = covariance.shape[-1]
        likelihood = likelihood or OneLabel()
        if contrasts == 0:
            return likelihood.log_probs(mean)[None]
        if contrasts < mean.shape[-1] - 1:
            groups = Groups.of(mean, contrasts)
            return groups.spread(self.log_probs(groups.mean, covariance))
        noise = gaussian_points(self.points, contrasts, self.seed).to(covariance)
        shift = torch.einsum("pk,bck->pbc", noise, self.scale * matrix_root(covariance))
        return likelihood.log_probs(likelihood.moved(mean, shift))


@functools.lru_cache(maxsize=8)
def gaussian_points(points: int, dimensions: int, seed: int) -> Tensor:
    """(points, dimensions) standard normal, float64: scrambled Sobol points in the first dimensions, independent draws
    shifted and scaled to mean 0 and variance 1 in the others.

    The first dimensions of more are the same, so that a row's points do not depend on the choices of rows beside it.
    """
    engine = torch.quasirandom.SobolEngine(_SOBOL, scramble=True, seed=seed)
    uniform = engine.draw(points, dtype=torch.float64)[:, :dimensions].clamp(1e-12, 1 - 1e-12)
    quasi = torch.special.ndtri(uniform)
    if dimensions <= _SOBOL:
        return quasi
    drawn = standard_normal(range(points), dimensions - _SOBOL, seed=seed, stream="linearized").double()
    if points > 1:
        drawn = drawn - drawn.mean(dim=0)
        drawn = drawn / drawn.square().mean(dim=0).sqrt()
    return torch.cat([quasi, drawn], dim=1)


def logit_gaussian(scorer: Scorer, batch: Batch, drawn: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean (B, C) of the class logits, and the covariance (B, C - 1, C - 1) of their differences to the first.

    The mean is -inf where a row has no such choice; the covariance is zero there. `drawn` names the layers that are
    uncertain, as `stochastic_layers` of the predictive.
    """
    logits, jacobians = logit_jacobian(scorer, batch, drawn)
    return logits, logit_covariance(scorer, jacobians)


@torch.no_grad()
def logit_covariance(scorer: Scorer, jacobians: dict[str, Tensor]) -> Tensor:
    """(B, C - 1, C - 1) J Sigma J^T of the layers whose Jacobians (B, C - 1, r) are given; the others are known."""
    joint = joint_of(scorer.model)
    if joint is not None:
        return joint.push_forward(jacobians)
    layers = stochastic_layers(scorer.model)
    parts = [j @ layers[name].posterior.covariance().float() @ j.transpose(1, 2) for name, j in jacobians.items()]
    return torch.stack(parts).sum(dim=0)


def logit_jacobian(
    scorer: Scorer,
    batch: Batch,
    drawn: str | None = None,
    contrasts: Callable[[Tensor], list[Tensor]] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The class logits at the posterior mean, and the Jacobian of their differences to the first in every layer's s; or
    of the K differences whose weights (B, C) `contrasts` gives for the logits.

    Of several labels a row it is the Jacobian of the C logits themselves, (B, C, r). The backward passes stop at the
    lowest of the layers: below it, the rows are run without gradient.

    Returns:
        logits (B, C), -inf where a row has no such choice; the layer's name -> (B, C - 1, r), or (B, K, r), zero there.

    Raises:
        UserError: the model was loaded under `torch.inference_mode()`, so that nothing can be differentiated.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # tensors that were made under it are copied: none of them is differentiable
            return logit_jacobian(
                scorer, batch.select(torch.arange(len(batch), device=scorer.device)), drawn, contrasts
            )
    if any(parameter.is_inference() for parameter in scorer.model.parameters()):
        raise UserError(
            "The linearised predictive differentiates, but this model was loaded under torch.inference_mode(); load "
            "it outside, or use Monte Carlo."
        )
    uncertain = drawn_layers(scorer.model, drawn)
    batch = scorer.with_trunk(batch, min(uncertain.values(), default=None))
    with torch.enable_grad(), values(scorer.model, len(batch)) as of_all, only(scorer.model, uncertain):
        layers = {name: of_all[name] for name in of_all if name in uncertain}
        logits = scorer.class_logits(batch)
        inputs = [s for s, _ in layers.values()]
        rows = len(logits)
        if contrasts is None:
            weights_of = scorer.scoring.likelihood.contrasts(logits, batch.num_choices)
        else:
            weights_of = contrasts(logits.detach())
        columns: list[list[Tensor]] = [[] for _ in inputs]
        # whether any row has such a choice; asked of the device once, not once a pass
        needed = torch.stack([weights.any() for weights in weights_of]).tolist() if weights_of else []
        for number, weights in enumerate(weights_of, start=1):
            if needed[number - 1]:
                gradients = torch.autograd.grad(logits, inputs, weights, retain_graph=number < len(weights_of))
            else:
                gradients = tuple(torch.zeros_like(s) for s in inputs)
            for store, gradient in zip(columns, gradients, strict=True):
                store.append(gradient.detach().float())
    jacobians = {
        name: torch.stack(store, dim=1) if store else torch.zeros(rows, 0, s.shape[1], device=logits.device)
        for store, (name, (s, _)) in zip(columns, layers.items(), strict=True)
    }
    return logits.detach(), jacobians


def matrix_root(covariance: Tensor) -> Tensor:
    """(..., C, C) positive semi-definite -> its symmetric root R, R R = R R^T; unique, and defined where singular."""
    eigenvalues, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * eigenvalues.clamp_min(0).sqrt()[..., None, :]) @ vectors.transpose(-1, -2)
    return root.to(covariance.dtype)


@dataclass(frozen=True)
class LayerVariance:
    """A layer's part of the predictive variance.

    Attributes:
        name: the adapted layer.
        depth: its decoder layer; their number for what follows them.
        variance: mean over the rows of tr(J_l Sigma_l J_l^T), in squared logits.
        share: of the sum over all layers.
    """

    name: str
    depth: int
    variance: float
    share: float


@torch.no_grad()
def summed_variances(model: nn.Module, jacobians: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Each layer's part of the variance of the logits' differences, summed over the rows of batches: tr J Sigma J^T.

    Args:
        model: with stochastic layers.
        jacobians: of each batch, (B, C - 1, r) by layer.
    """
    covariances = {name: leaf.posterior.covariance().float() for name, leaf in stochastic_layers(model).items()}
    totals: dict[str, float] = defaultdict(float)
    for of_layers in jacobians:
        for name, jacobian in of_layers.items():
            totals[name] += ((jacobian @ covariances[name]) * jacobian).sum().item()
    return totals


@torch.inference_mode(False)
@torch.no_grad()
def layer_variances(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> list[LayerVariance]:
    """Every stochastic layer's part of the predictive variance, lowest first.

    Args:
        scorer: the model with its scoring.
        rows: encoded rows; their answers are not read.
        batch_size: rows at a time; the figures do not depend on it.
        advance: called with the number of rows done, for a progress bar.

    Raises:
        UserError: no rows, the model has no stochastic layer, or nothing is uncertain in any.
    """
    if not rows:
        raise UserError("The variance of predictions is measured on rows, but there are none; give some.")
    depths = drawn_layers(scorer.model, None)

    def jacobians() -> Iterator[dict[str, Tensor]]:
        for indices, batch in scorer.encoded_batches(rows, batch_size):
            yield logit_jacobian(scorer, batch)[1]
            if advance is not None:
                advance(len(indices))

    with eval_mode(scorer.model):
        found = summed_variances(scorer.model, jacobians())
    totals = {name: found.get(name, 0.0) for name in sorted(depths, key=lambda name: depths[name])}
    whole = sum(totals.values())
    if not whole > 0:
        raise UserError("No layer's s moves a prediction: B is zero or sigma has collapsed, so there are no shares.")
    return [
        LayerVariance(name, depths[name], variance / len(rows), variance / whole) for name, variance in totals.items()
    ]
