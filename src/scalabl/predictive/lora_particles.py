"""Particles in a LoRA layer without a posterior over s: noise on A and B, or masks of A's input, a particle a row.

    noise:    p(y | x) = 1/N sum_n p(y | x, A + noise_An, B + noise_Bn)
    dropout:  p(y | x) = 1/N sum_n p(y | x, z_n), N fixed masks of every A's input (Gal and Ghahramani 2016)

Rows i B .. (i + 1) B - 1 of a batch of N B rows carry particle i in every layer, as `scalabl.particles` has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scalabl.core.errors import UserError
from scalabl.core.modules import base_name
from scalabl.posterior.draws import standard_normal, uniform
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.tuner.blob import blob_layers
from scalabl.tuner.layers import active_adapters, require_live, unwrap, without_rows
from scalabl.tuner.threads import own


@dataclass(frozen=True)
class LoraParts:
    """One adapted layer: y = W0 x + scaling B A x.

    Attributes:
        down: the module of A, (r, d_in) its weight.
        up: the module of B, (d_out, r) its weight.
        scaling: alpha / r.
    """

    down: nn.Module
    up: nn.Module
    scaling: float

    @property
    def a(self) -> Tensor:
        return self.down.weight  # type: ignore[return-value]

    @property
    def b(self) -> Tensor:
        return self.up.weight  # type: ignore[return-value]


def lora_parts(model: nn.Module) -> dict[str, LoraParts]:
    """The linear layers that the active adapter adapts and that see rows of tokens, by their names in the base model.

    Raises:
        UserError: there is none.
    """
    model = unwrap(model)
    adapter = active_adapters(model)[0]
    found, plain = {}, without_rows(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A and not plain(name):
            parts = LoraParts(module.lora_A[adapter], module.lora_B[adapter], module.scaling[adapter])
            found[base_name(name)] = parts
    if not found:
        raise UserError("The model has no LoRA layer; load a run of scalabl train.")
    return found


def lora_matrices(model: nn.Module) -> dict[str, Any]:
    """Every A and B of the active adapter as a module with a `weight`, by "LAYER.lora_A" and "LAYER.lora_B"."""
    found: dict[str, Any] = {}
    for name, parts in lora_parts(model).items():
        found |= {f"{name}.lora_A": parts.down, f"{name}.lora_B": parts.up}
    return found


@contextmanager
def weight_noise(model: nn.Module, noise: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which particle n has W + noise[n] in the place of the matrix W.

    Args:
        model: a PEFT model with a LoRA adapter.
        noise: (N, d_out, d_in) by the name of an A or a B, as in `lora_matrices`.
    """

    def hook_of(values: Tensor) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = inputs[0]
            number = _particles(x, values)
            flat = x.reshape(number, -1, x.shape[-1])
            return output + torch.bmm(flat, values.to(x).transpose(1, 2)).view(output.shape)

        return hook

    require_live(model)
    matrices = lora_matrices(model)
    with removed_after([matrices[name].register_forward_hook(own(hook_of(values))) for name, values in noise.items()]):
        yield


def empty_noise(model: nn.Module, samples: int, names: Sequence[str]) -> AbstractContextManager[None]:
    """`weight_noise` of these matrices as shapes alone, on the meta device."""
    shapes = {name: lora_matrices(model)[name].weight.shape for name in names}
    return weight_noise(model, {name: torch.empty(samples, *shape, device="meta") for name, shape in shapes.items()})


@contextmanager
def input_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which particle n sees mask[n] * x in the place of A's input x.

    Args:
        model: a PEFT model with a LoRA adapter.
        masks: (N, d_in) factors by the layer's name.
    """

    def hook_of(values: Tensor) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            number = _particles(x, values)
            masked = x.reshape(number, -1, x.shape[-1]) * values.to(x)[:, None]
            return (masked.view(x.shape), *inputs[1:])

        return hook

    require_live(model)
    parts = lora_parts(model)
    with removed_after([parts[name].down.register_forward_pre_hook(own(hook_of(v))) for name, v in masks.items()]):
        yield


@contextmanager
def removed_after(handles: list[RemovableHandle]) -> Iterator[None]:
    """Context behind which hooks are taken out again."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _particles(x: Tensor, values: Tensor) -> int:
    number = values.shape[0]
    if x.dim() < 3 or x.shape[0] % number:
        raise UserError(
            f"A batch of shape {tuple(x.shape)} cannot carry {number} particles: give (rows, tokens, d), with the "
            f"rows repeated {number} times."
        )
    return number


def dropout_masks(samples: int, width: int, p: float, *, seed: int, stream: str) -> Tensor:
    """(samples, width) factors: 0 with probability p, else 1 / (1 - p); mask n is the same in every run of a seed."""
    kept = uniform(range(samples), width, seed=seed, stream=stream) >= p
    return kept.float() / (1 - p)


class DropoutPredictive(MonteCarloPredictive):
    """N fixed dropout masks. A mask drops columns of A, diag(z) on its input, for all tokens of a row: it is a draw
    of the weights, W diag(z), while training draws one mask for every token.

    Args:
        p: probability to drop, in (0, 1).
        samples: N, at least 1.
        seed: of the masks; a mask depends on (seed, particle, layer) alone.
        chunk: how many particles at once; None fits them to the free memory. The answers do not depend on it.

    Raises:
        UserError: p is not between 0 and 1.
    """

    has_scale = False

    def __init__(self, p: float = 0.1, *, samples: int = 10, seed: int = 0, chunk: int | None = None) -> None:
        if not 0 < p < 1:
            raise UserError(f"The dropout probability is {p}; it must be between 0 and 1, 0.1 is the usual choice.")
        super().__init__(samples, seed=seed, chunk=chunk)
        self.p = p
        self._masks: dict[str, Tensor] = {}

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """(N, d_in) masks by layer, drawn once."""
        if not self._masks:
            for name, parts in lora_parts(model).items():
                masks = dropout_masks(self.samples, parts.a.shape[1], self.p, seed=self.seed, stream=f"{name}.dropout")
                self._masks[name] = masks.to(parts.a.device)
        return self._masks

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        chunk = slice(first, first + number)
        return input_masks(model, {name: masks[chunk] for name, masks in self.masks(model).items()})


class WeightNoisePredictive(MonteCarloPredictive):
    """N fixed draws of noise on A, B or both, the same for every input and every run of the same seed.

    Args:
        names: the matrices, as in `lora_matrices`; BLoB and TFB have noise on every A, IVON on every A and B.
        spread: a matrix's name and standard normal noise (N, d_out, d_in) -> the noise on it, of the same shape. BLoB
            and IVON scale it elementwise, TFB mixes its rows.
        samples: N, at least 1.
        seed: of the draws; a draw depends on (seed, particle, matrix) alone.
        chunk: how many particles at once; None fits them to the free memory. The answers do not depend on it.
    """

    def __init__(
        self,
        names: Sequence[str],
        spread: Callable[[str, Tensor], Tensor],
        *,
        samples: int = 10,
        seed: int = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(samples, seed=seed, chunk=chunk)
        self.names = list(names)
        self.spread = spread
        self._noise: dict[str, Tensor] = {}

    @classmethod
    def of_std(cls, std: Mapping[str, Tensor], *, samples: int = 10, seed: int = 0) -> Self:
        """Draws from N(W, std^2), elementwise.

        Args:
            std: standard deviations (d_out, d_in) by the matrix's name.
            samples: N.
            seed: of the draws.
        """
        return cls(list(std), lambda name, normal: std[name].to(normal) * normal, samples=samples, seed=seed)

    def noise(self, model: nn.Module) -> dict[str, Tensor]:
        """(N, d_out, d_in) noise by the matrix's name, drawn once."""
        if not self._noise:
            matrices = lora_matrices(model)
            for name in self.names:
                weight = matrices[name].weight
                normal = standard_normal(range(self.samples), weight.numel(), seed=self.seed, stream=name)
                self._noise[name] = self.spread(name, normal.view(self.samples, *weight.shape).to(weight.device))
        return self._noise

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        chunk = slice(first, first + number)
        return weight_noise(model, {name: self.scale * values[chunk] for name, values in self.noise(model).items()})


def blob_draws(model: nn.Module, *, samples: int = 10, seed: int = 0) -> WeightNoisePredictive:
    """N draws of every A from a BLoB adapter's posterior.

    Raises:
        UserError: the model has no BLoB layer, or samples is below 1.
    """
    std = {f"{name}.lora_A": leaf.posterior.std.detach() for name, leaf in blob_layers(model).items()}
    return WeightNoisePredictive.of_std(std, samples=samples, seed=seed)
