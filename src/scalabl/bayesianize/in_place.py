"""Stochastic layers in a loaded plain LoRA for as long as a context lasts: the same base, the same predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalabl.bayesianize.svd import Factors, factorise
from scalabl.errors import UserError
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive.lora_particles import lora_parts
from scalabl.tuner import StochasticProjection
from scalabl.tuner.joint import set_joint
from scalabl.tuner.layers import active_adapters, unwrap


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The SVD of every layer of the active adapter, by the layer's name.

    Raises:
        UserError: no LoRA layer, or a layer that is no linear one.
    """
    found = {}
    for name, parts in lora_parts(model).items():
        if not isinstance(parts.down, nn.Linear):
            raise UserError(f"{name} is no linear layer of a plain LoRA, so it cannot be made Bayesian.")
        found[name] = factorise(parts.a, parts.b)
    return found


class StochasticLeaves:
    """Leaves made once from a plain LoRA's factors, and put in place as often as they are needed.

    Args:
        factors: of every adapted layer, s = 1.
        joint: their joint covariance; None leaves them without one (to be fitted).
    """

    def __init__(self, factors: Mapping[str, Factors], joint: JointGaussian | None = None) -> None:
        self.factors = dict(factors)
        self.joint = joint
        self._leaves = {name: _leaf(f) for name, f in self.factors.items()}

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's active adapter is Bayesian."""
        adapter = active_adapters(unwrap(model))[0]
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in unwrap(model).named_modules()
            if isinstance(module, LoraLayer) and adapter in module.lora_A
        }
        before: dict[str, tuple[nn.Module, Tensor]] = {
            name: (layer.lora_A[adapter], layer.lora_B[adapter].weight.data)  # type: ignore[misc]
            for name, layer in layers.items()
        }
        try:
            for name, layer in layers.items():
                down, up = before[name]
                layer.lora_A[adapter] = self._leaves[name].to(device=up.device).train(down.training)
                layer.lora_B[adapter].weight.data = self.factors[name].up.to(up)
            set_joint(model, self.joint, adapter)
            yield
        finally:
            set_joint(model, None, adapter)
            for name, layer in layers.items():
                layer.lora_A[adapter], layer.lora_B[adapter].weight.data = before[name]


def _leaf(factors: Factors) -> StochasticProjection:
    with torch.random.fork_rng():  # the leaf draws an initial sigma, which is set below
        leaf = StochasticProjection(factors.rows, covariance="full")
    with torch.no_grad():
        leaf.direction.copy_(factors.rows)
        leaf.posterior.log_mean.zero_()
    return leaf.requires_grad_(False)
