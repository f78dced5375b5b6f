"""What a posterior looks like, layer by layer, and what is wrong with it, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.posterior.gaussian import Gaussian, Prior
from scalabl.tuner.layers import stochastic_layers

COLLAPSED, BEYOND_PRIOR, DROWNED, STILL_FALLING = 1e-3, 1.2, 1.0, 0.15
AT_PRIOR = 0.03  # nats a number: sigma is then within a sixth of the prior's, the mean within a quarter of that
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


def warnings_of(rows: list[LayerSummary]) -> list[str]:
    """Sentences about a posterior that collapsed, outgrew its prior or is it, drowns its signal, or moves nothing."""
    found = []
    for many, sentence in (
        (
            [r for r in rows if r.sigma < COLLAPSED * r.prior_std],
            "sigma has collapsed to 0: nothing is uncertain there",
        ),
        ([r for r in rows if r.sigma > BEYOND_PRIOR * r.prior_std], "sigma has grown past the prior's"),
        ([r for r in rows if r.noise > DROWNED], "the noise is larger than the mean of s"),
        (
            [r for r in rows if r.kl < AT_PRIOR * r.r],
            "the posterior is the prior: rows say nothing about s, and the doubt is as large as --prior-std has it",
        ),
        ([r for r in rows if r.effect < 1e-8], "B is zero: the layer was never trained"),
    ):
        if many:
            found.append(f"{len(many)} of {len(rows)} layers ({many[0].name} first): {sentence}.")
    return found


def logged(entry: Mapping[str, float], name: str) -> float | None:
    """What a callback of the ELBO added to a record of a training log; older logs have it without the prefix."""
    return entry.get(f"{PREFIX}{name}", entry.get(name))


def unconverged(log: list[dict[str, float]]) -> list[str]:
    """A sentence where the KL of a training log was still falling fast: sigma then stands where the learning rate
    left it, not where the data wants it. Adam moves a logarithm by the sum of its learning rates at most.

    Args:
        log: logged records with step and "elbo/kl".
    """
    records = [value for entry in log if (value := logged(entry, "kl")) is not None]
    if len(records) < 4:
        return []
    middle, last = records[len(records) // 2], records[-1]
    if not last < (1 - STILL_FALLING) * middle:
        return []
    return [
        f"the posterior has not converged (KL {middle:.0f} nats half-way, {last:.0f} at the end): raise "
        "--variational-learning-rate or --steps"
    ]
