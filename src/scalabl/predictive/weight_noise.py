"""Monte Carlo over Gaussian noise on A: p(y | x) = 1/N sum_n p(y | x, A + noise_n), the particles as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from scalabl.posterior import standard_normal
from scalabl.predictive.lora_particles import lora_parts, weight_noise
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.tuner_blob import blob_layers


class WeightNoisePredictive(MonteCarloPredictive):
    """N fixed draws of noise on every A, the same for every input and every run of the same seed.

    Args:
        spread: layer name -> a function from standard normal noise (N, r, d_in) to the noise on A, of the same
            shape. BLoB scales it elementwise, TFB mixes its rows.
        samples: N, at least 1.
        seed: of the draws; a draw depends on (seed, particle, layer) alone.
        chunk: how many particles at once; None fits them to the free memory. The answers do not depend on it.
    """

    def __init__(
        self,
        spread: Mapping[str, Callable[[Tensor], Tensor]],
        *,
        samples: int = 10,
        seed: int = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__(samples, seed=seed, chunk=chunk)
        self.spread = spread
        self._noise: dict[str, Tensor] = {}

    def noise(self, model: nn.Module) -> dict[str, Tensor]:
        """(N, r, d_in) noise on A by layer, drawn once."""
        if not self._noise:
            for name, parts in lora_parts(model).items():
                shape, stream = parts.a.shape, f"{name}.lora_A"
                normal = standard_normal(range(self.samples), shape.numel(), seed=self.seed, stream=stream)
                self._noise[name] = self.spread[name](normal.view(self.samples, *shape).to(parts.a.device))
        return self._noise

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        chunk = slice(first, first + number)
        return weight_noise(model, {name: values[chunk] for name, values in self.noise(model).items()})


def blob_draws(model: nn.Module, *, samples: int = 10, seed: int = 0) -> WeightNoisePredictive:
    """N draws of every A from a BLoB adapter's posterior.

    Raises:
        UserError: the model has no BLoB layer, or samples is below 1.
    """

    def spread_of(std: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda normal: std * normal

    spread = {name: spread_of(leaf.posterior.std.detach()) for name, leaf in blob_layers(model).items()}
    return WeightNoisePredictive(spread, samples=samples, seed=seed)
