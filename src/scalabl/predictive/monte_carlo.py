"""The Monte Carlo predictive: p(y | x) = 1/N sum_n p(y | x, s_n), the particles as rows of one batch."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from scalabl.errors import UserError
from scalabl.predictive.memory import particles_at_once
from scalabl.scoring import Batch, Scorer
from scalabl.tuner import particles


class MonteCarloPredictive:
    """N fixed draws, the same for every input and every run of the same seed [ScalaBL, Bayesian model average].

    Args:
        samples: N, at least 1.
        seed: the seed of the draws.
        chunk: how many particles at once; None fits them to the free memory. The answers do not depend on it.

    Raises:
        UserError: N is below 1.
    """

    name = "mc"

    def __init__(self, samples: int = 10, *, seed: int = 0, chunk: int | None = None) -> None:
        if samples < 1:
            raise UserError(f"samples is {samples}; it must be at least 1.")
        self.samples = samples
        self.seed = seed
        self.chunk = chunk

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        at_once = self.chunk or particles_at_once(scorer.model, batch, self.samples)
        parts, first = [], 0
        while first < self.samples:
            number = min(at_once, self.samples - first)
            try:
                parts.append(self._chunk(scorer, batch, first, number))
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once //= 2  # smaller chunks, same particles
                torch.cuda.empty_cache()
                continue
            first += number
        return torch.cat(parts)

    def context(self, model: nn.Module, first: int, number: int) -> AbstractContextManager[None]:
        """Context in which a batch of `number` B rows carries the particles first .. first + number - 1."""
        return particles(model, number, seed=self.seed, first=first)

    def _chunk(self, scorer: Scorer, batch: Batch, first: int, number: int) -> Tensor:
        with self.context(scorer.model, first, number):
            log_probs = scorer.class_log_probs(batch.repeat(number))
        return log_probs.view(number, len(batch), -1)
