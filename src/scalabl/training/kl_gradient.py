"""The KL's closed-form gradient, added to the gradients that the likelihood has left in `.grad`."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from scalabl.posterior.gaussian import DiagonalGaussian, Gaussian, forward_kl_gradient
from scalabl.posterior.prior import Prior


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
