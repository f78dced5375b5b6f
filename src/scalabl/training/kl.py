"""The KL in an optimiser step: how much it weighs, and its closed-form gradient beside that of the likelihood.

The objective of one epoch, divided by the number N of training examples, is

    mean_i E_q[-log p(y_i | x_i, s)] + KL(q || p) / N                                       [ScalaBL, the ELBO]

A trainer minimises the first term, a mean over a batch; the KL's weight at a step is `share / N`, a pure function of
the step's number, with a share that depends on the schedule and is 1 on average for `elbo` and `minibatch`. The
gradient is added to what the likelihood has left in `.grad`.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from scalabl.posterior.gaussian import DiagonalGaussian, Gaussian, Prior, forward_kl_gradient

Schedule = Literal["elbo", "warmup", "minibatch"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def warmup_share(step: int, total_steps: int, fraction: float) -> float:
    """Share of the KL under linear warm-up: 0 at step 0, 1 from step `fraction * total_steps` on.

    Args:
        step: optimiser steps done so far, from 0.
        total_steps: optimiser steps of the whole run.
        fraction: length of the warm-up as a fraction of the run, in [0, 1]; 0 is no warm-up.
    """
    length = fraction * total_steps
    return 1.0 if step >= length else step / length


def minibatch_share(step: int, cycle: int) -> float:
    """Share of the KL under the minibatch weights, pi_i times the cycle's length: 1 on average over a cycle.

    pi_i = 2^i / (2^(M+1) - 1), i = 0 .. M, with M + 1 = cycle: the pi_i of a cycle sum to 1, so that a cycle (an epoch)
    counts the KL once, nearly all of it in its last steps [ScalaBL, section on the experiments; the weights of
    Blundell et al. 2015, "Weight uncertainty in neural networks", eq. 9, in the reverse order].

    Args:
        step: optimiser steps done so far, from 0.
        cycle: M + 1, the steps of a cycle, at least 1.
    """
    i, last = step % cycle, cycle - 1
    # both numerator and denominator divided by 2^M: 2^M itself overflows from M = 1024 on
    return cycle * math.ldexp(1.0, i - last) / (2.0 - math.ldexp(1.0, -last))


def kl_weight(
    schedule: Schedule,
    step: int,
    *,
    num_examples: int,
    total_steps: int,
    cycle: int,
    warmup_fraction: float = 0.1,
    beta: float = 1.0,
) -> float:
    """The factor of KL(q || p) in the loss of one optimiser step: beta * share(step) / num_examples.

    Args:
        schedule: "elbo" (the exact ELBO, share 1 at every step), "warmup" or "minibatch".
        step: optimiser steps done so far, from 0.
        num_examples: N, the number of terms that the loss is a mean of over one epoch.
        total_steps: optimiser steps of the whole run; read by "warmup".
        cycle: steps of one cycle, usually of an epoch; read by "minibatch".
        warmup_fraction: fraction of the run in which the share rises from 0 to 1; read by "warmup".
        beta: multiplier; 1 is the ELBO, smaller values are a tempered posterior.
    """
    share = 1.0
    if schedule == "warmup":
        share = warmup_share(step, total_steps, warmup_fraction)
    elif schedule == "minibatch":
        share = minibatch_share(step, cycle)
    return beta * share / num_examples


@torch.no_grad()
def add_kl_gradients(posteriors: Iterable[Gaussian], prior: Prior, weight: float, kl: str = "reverse") -> None:
    """Add the gradient of weight * KL to the `.grad` of every trainable parameter of the posteriors.

    Layers of one shape are computed together, with the numbers that each would get alone.

    Args:
        posteriors: one a layer; their parameters may be shards (FSDP 2).
        prior: of each of them.
        weight: of the KL.
        kl: "reverse", KL(q || p), or "forward", KL(p || q).
    """
    together: dict[Hashable, list[Gaussian]] = defaultdict(list)
    for posterior in posteriors:
        together[_shape(posterior, prior)].append(posterior)
    for alike in together.values():
        if len(alike) == 1:
            gradients = _gradient(alike[0], prior, kl)
            _add(alike, {name: [weight * gradient] for name, gradient in gradients.items()})
        else:
            gradients = _stacked_gradients(alike, prior, kl)
            _add(alike, {name: (weight * gradient).unbind() for name, gradient in gradients.items()})


def with_parameters(posterior: Gaussian, parameters: Mapping[str, Tensor]) -> Gaussian:
    """A posterior of the same kind with other tensors as its parameters; the original is left as it is."""
    other = copy.copy(posterior)
    other._parameters = dict(parameters)  # type: ignore[arg-type]
    return other


def _gradient(posterior: Gaussian, prior: Prior, kl: str) -> dict[str, Tensor]:
    if kl == "forward":
        assert isinstance(posterior, DiagonalGaussian)
        return forward_kl_gradient(posterior, prior)
    return posterior.kl_gradient(prior)


def _stacked_gradients(alike: Sequence[Gaussian], prior: Prior, kl: str) -> dict[str, Tensor]:
    """The gradients of L posteriors of one shape, by parameter name: (L, ...)."""
    first = alike[0]
    stacked = {name: torch.stack([_local(_parameters(p)[name]) for p in alike]) for name in _parameters(first)}
    gradients: dict[str, Tensor] = torch.vmap(lambda one: _gradient(with_parameters(first, one), prior, kl))(stacked)
    return gradients


def _shape(posterior: Gaussian, prior: Prior) -> Hashable:
    """Equal for posteriors that can be stacked. What an empirical prior sums over a layer cannot: the order of a sum,
    and so its last bit, would be another one. Else the gradient is elementwise, so that of shards this rank's own parts
    are stacked."""
    if prior.empirical:
        return id(posterior)
    parts = [_local(parameter) for parameter in _parameters(posterior).values()]
    return type(posterior), *((p.shape, p.dtype, p.device) for p in parts)


def _parameters(posterior: Gaussian) -> dict[str, nn.Parameter]:
    """By name, without a walk over submodules, of which a posterior has none: this is done in every step."""
    return posterior._parameters  # type: ignore[return-value]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a shard (FSDP 2); the tensor itself otherwise."""
    return tensor.to_local() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined, no-any-return]


def _add(posteriors: Sequence[Gaussian], gradients: Mapping[str, Sequence[Tensor]]) -> None:
    """Add one gradient a posterior to each trainable parameter."""
    for name, of_each in gradients.items():
        present: list[Tensor] = []
        added: list[Tensor] = []
        for posterior, gradient in zip(posteriors, of_each, strict=True):
            parameter = _parameters(posterior)[name]
            if not parameter.requires_grad:
                continue
            if parameter.grad is None and type(gradient) is type(parameter.data):
                parameter.grad = gradient.to(parameter.dtype, copy=True)
                continue
            if parameter.grad is None:  # a shard, of which this gradient is a part
                parameter.grad = torch.zeros_like(parameter)
            present.append(_local(parameter.grad))
            added.append(_local(gradient).to(parameter.grad.dtype))
        if present:
            torch._foreach_add_(present, added)
