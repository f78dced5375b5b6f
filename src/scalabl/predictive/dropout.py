"""MC dropout: p(y | x) = 1/N sum_n p(y | x, z_n), with N fixed masks of every A's input (Gal and Ghahramani 2016)."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor, nn

from scalabl.errors import UserError
from scalabl.posterior.draws import uniform
from scalabl.predictive.lora_particles import input_masks, lora_parts
from scalabl.predictive.monte_carlo import MonteCarloPredictive


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
