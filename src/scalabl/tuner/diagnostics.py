"""What a posterior looks like, layer by layer, and what is wrong with it, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.posterior.gaussian import Gaussian, Prior
from scalabl.tuner.layers import stochastic_layers

COLLAPSED, BEYOND_PRIOR, DROWNED = 1e-3, 1.2, 1.0
MOVING = 0.25  # of Adam's largest step: sigma moved so on average at the end of training, in one direction
NEAR_PRIOR = 0.2  # between the logarithms of two sigmas: as close as sigma is where the posterior is the prior
AT_PRIOR = 0.03  # nats a number: sigma is then within a sixth of the prior's, the mean within a quarter of that
_LEAST = 1e-9  # of a sum of learning rates
START, NARROW = 0.577, 0.35  # where LoRA's draw puts every s, and the std of a prior around it, relative to it
PREFIX = "elbo/"  # of what the callbacks of the ELBO add to a training log


@dataclass(frozen=True)
class LayerSummary:
    """One layer's posterior.

    Attributes:
        name: the adapted layer.
        r: its rank.
        mean: average of the means of s.
        sigma: average of the marginal standard deviations of s.
        noise: root mean square of sigma / mean, the noise beside the signal.
        prior_std: standard deviation of the prior; the layer's own where it is empirical.
        kl: KL(q || p) in nats.
        effect: Frobenius norm of B diag(mean) A times the scaling: how much the adapter changes the layer.
    """

    name: str
    r: int
    mean: float
    sigma: float
    noise: float
    prior_std: float
    kl: float
    effect: float


@dataclass(frozen=True)
class LayerWeights:
    """What a layer's summary is made from.

    Attributes:
        name: the adapted layer.
        posterior: q(s).
        rows: (r, d_in) the projection A as the forward pass uses it.
        up: (d_out, r) the matrix B.
        scaling: alpha / r.
    """

    name: str
    posterior: Gaussian
    rows: Tensor
    up: Tensor
    scaling: float


def weights_of(model: nn.Module) -> list[LayerWeights]:
    """The weights of every stochastic layer of a model's active adapter.

    Raises:
        UserError: the model has none.
    """
    modules = dict(model.named_modules())
    paths = {id(module): path for path, module in modules.items()}
    found = []
    for name, leaf in stochastic_layers(model).items():
        layer_path, _, adapter_name = paths[id(leaf)].partition(".lora_A.")  # wrappers and all
        layer: Any = modules[layer_path]
        up = layer.lora_B[adapter_name].weight
        found.append(LayerWeights(name, leaf.posterior, leaf.rows(), up, layer.scaling[adapter_name]))
    return found


@torch.no_grad()
def summarize(layers: list[LayerWeights], prior: Prior) -> list[LayerSummary]:
    """A summary of every layer."""
    found = []
    for layer in layers:
        mean, sigma = layer.posterior.mean, layer.posterior.marginal_std()
        up, down = layer.up.float(), mean[:, None] * layer.rows.float()
        # |B D A|_F^2 = tr(B D A A^T D B^T), with nothing larger than r x r beside B and A
        effect = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()
        found.append(
            LayerSummary(
                name=layer.name,
                r=layer.posterior.r,
                mean=mean.mean().item(),
                sigma=sigma.mean().item(),
                noise=(sigma / mean).square().mean().sqrt().item(),
                prior_std=prior.variance(mean, sigma.square()).sqrt().item(),
                kl=layer.posterior.kl(prior).item(),
                effect=effect.item() * layer.scaling,
            )
        )
    return found


@dataclass(frozen=True)
class Drift:
    """How sigma moved at the end of a training.

    Attributes:
        speed: by how much of Adam's largest step the logarithm of sigma moved on average while the last half of the
            sum of the learning rates was spent: -1 (always down) to 1 (always up), about 0 where it stood.
        began, ended: sigma where that half began, and at the end.
        steps: of the training.
        reach: the sum of the learning rates of s over all steps, which the logarithm can move by at most.
        prior_mean: of the prior that it was trained under.
        bayesianized: whether it is of `bayesianize`, where s begins at 1 and the prior's mean is 0.
    """

    speed: float
    began: float
    ended: float
    steps: int
    reach: float
    prior_mean: float
    bayesianized: bool = False


def drift_of(log: Sequence[Mapping[str, float]], recipe: Mapping[str, Any], bayesianized: bool = False) -> Drift | None:
    """How sigma moved at the end of a training, or None where its log does not say: a plain LoRA, fewer than four
    records, an optimiser whose step is not bounded by its rate as Adam's is.

    Args:
        log: logged records with step, learning_rate (of A and B) and "elbo/sigma_mean".
        recipe: the run's settings by their names.
        bayesianized: see `Drift`.
    """
    records = [
        (entry["step"], entry["learning_rate"], math.log(sigma))
        for entry in log
        if 0 < (sigma := logged(entry, "sigma_mean") or 0) < math.inf and entry.keys() >= {"step", "learning_rate"}
    ]
    if len(records) < 4 or "adam" not in recipe.get("optimizer", "adam") or not recipe["learning_rate"] > 0:
        return None
    ratio = recipe["variational_learning_rate"] / recipe["learning_rate"]
    spent = [records[0][0] * records[0][1] * ratio]  # sums of the rates of s up to each record
    for (step, rate, _), (later, next_rate, _) in pairwise(records):
        spent.append(spent[-1] + (later - step) * ratio * (rate + next_rate) / 2)
    half = max(spent[-1] / 2, spent[0])
    after = next((i for i, sum_of_rates in enumerate(spent) if i and sum_of_rates > half), None)
    if after is None or not _LEAST < spent[-1] - half < math.inf:  # an altered log
        return None
    part = (half - spent[after - 1]) / (spent[after] - spent[after - 1])
    began = records[after - 1][2] + part * (records[after][2] - records[after - 1][2])
    ended = records[-1][2]
    return Drift(
        speed=(ended - began) / (spent[-1] - half), began=math.exp(began), ended=math.exp(ended),
        steps=int(recipe["steps"]), reach=spent[-1], prior_mean=float(recipe.get("prior_mean", 0.0)),
        bayesianized=bayesianized,
    )  # fmt: skip


def warnings_of(rows: Sequence[LayerSummary], drift: Drift | None = None, linearized: bool = False) -> list[str]:
    """Sentences about a posterior that was still moving, collapsed, outgrew its prior or is it, drowns its signal, or
    moves nothing.

    Args:
        rows: a summary of every layer.
        drift: how sigma moved at the end of the training, where that is known.
        linearized: whether it is read by its linearisation, in which no noise moves the mean prediction's logits.
    """
    moving = None if drift is None or not rows else _moving(rows, drift)
    found = [] if moving is None else [moving]
    for many, sentence in (
        (
            [r for r in rows if r.sigma < COLLAPSED * r.prior_std],
            "sigma has collapsed to 0: nothing is uncertain there",
        ),
        ([r for r in rows if r.sigma > BEYOND_PRIOR * r.prior_std], "sigma has grown past the prior's"),
        ([r for r in rows if r.noise > DROWNED and not linearized], "the noise is larger than the mean of s"),
        (
            [r for r in rows if r.kl < AT_PRIOR * r.r and moving is None],
            "the posterior is the prior: rows say nothing about s, and the doubt is as large as the prior is wide",
        ),
        ([r for r in rows if r.effect < 1e-8], "B is zero: the layer was never trained"),
    ):
        if many:
            found.append(f"{len(many)} of {len(rows)} layers ({many[0].name} first): {sentence}.")
    return found


def _moving(rows: Sequence[LayerSummary], drift: Drift) -> str | None:
    """What to do about a sigma that the end of training stopped; None where it stood, or where it is at its prior's,
    past it or at 0, of which other sentences speak."""
    numbers = sum(row.r for row in rows)
    sigma = sum(row.sigma * row.r for row in rows) / numbers
    prior_std = sum(row.prior_std * row.r for row in rows) / numbers
    mean = sum(row.mean * row.r for row in rows) / numbers
    if abs(drift.speed) < MOVING or sigma < COLLAPSED * prior_std:
        return None
    left, rising = math.log(prior_std / sigma), drift.speed > 0
    if left * drift.speed > 0 and abs(left) < NEAR_PRIOR or (rising and left < 0):
        return None
    said = (
        f"sigma was still {'rising' if rising else 'falling'} when training ended ({drift.began:.2g} to "
        f"{drift.ended:.2g} in the last half of its learning), so its size is the work of --steps and not of the rows: "
    )
    command = "bayesianize" if drift.bayesianized else "train"
    if rising and prior_std > abs(mean):  # where it goes to, the noise is larger than the mean
        narrow = NARROW * (1.0 if drift.bayesianized else drift.prior_mean or START)
        prior = f"--prior-std {narrow:.2g}"
        if not drift.bayesianized and not drift.prior_mean:
            prior = f"--prior-mean {START} {prior}"
        steps = "" if sigma >= narrow else f" --steps {_steps(drift, math.log(narrow / sigma))}"
        return f"{said}{command} with {prior}{steps}; under this prior, more steps would only make s noise."
    # to the prior's, or as far again where it goes elsewhere
    more = abs(left) if left * drift.speed > 0 else max(abs(drift.speed) * drift.reach, NEAR_PRIOR)
    return f"{said}{command} with --steps {_steps(drift, more)}."


def _steps(drift: Drift, more: float) -> int:
    """Steps after which a logarithm has moved by so much more at this speed, and as many again in which it stands."""
    steps = 2 * drift.steps * (1 + more / abs(drift.speed) / drift.reach)
    digits = 10 ** max(0, math.floor(math.log10(steps)) - 1)
    return math.ceil(steps / digits) * digits


def logged(entry: Mapping[str, float], name: str) -> float | None:
    """What a callback of the ELBO added to a record of a training log; older logs have it without the prefix."""
    return entry.get(f"{PREFIX}{name}", entry.get(name))
