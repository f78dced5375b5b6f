"""TFB (Shi et al. 2025, 2412.05723): training-free Bayesianisation of a finished LoRA by one scale of noise.

    B = U diag(d) V^T,   B A = (U diag(d)) (V^T A),   (V^T A)_ij gets noise N(0, (sigma / d_i)^2)

so that the noise on B A is sigma U E, isotropic in the space that B's columns span: every direction of it gets the
same variance, and none beyond it gets any. sigma is the largest for which the NLL of anchor rows changes by at most
0.3 %, found by 5 steps of bisection on [0.001, 0.2].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl.data.example import Example
from scalabl.inference.predictor import labels_of
from scalabl.methods.saved import SavedMethod
from scalabl.metrics.uncertainty import negative_log_likelihood
from scalabl.predictive.base import MeanPredictive, Predictive, predict
from scalabl.predictive.lora_particles import WeightNoisePredictive, lora_parts
from scalabl.runs.method import Run

LOW, HIGH, STEPS, TOLERANCE = 0.001, 0.2, 5, 0.003
# the search costs 6 N passes over the anchor rows
ANCHOR_ROWS, SEARCH_SAMPLES = 200, 10
# singular values below this share of the largest are none: noise / 0 has no meaning there
_NEGLIGIBLE = 1e-6


class TFB(SavedMethod):
    """The largest noise that the anchor rows let pass; the average over N draws of it, or the adapter for N = 0."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
        anchor_rows: int = ANCHOR_ROWS,
    ) -> dict[str, Any]:
        """The largest noise that the anchor rows, training rows drawn without the seed, let pass.

        Raises:
            UserError: no training rows, or the run is no plain LoRA.
        """
        anchor = list(train_rows)
        if anchor_rows < len(anchor):
            anchor = random.Random(0).sample(anchor, anchor_rows)
        encoded = self.encoded(run, anchor, batch_size=batch_size)
        labels, likelihood = labels_of(anchor), run.scorer.scoring.likelihood
        mixers = noise_mixers({name: parts.b for name, parts in lora_parts(run.scorer.model).items()})

        def nll(strategy: Predictive) -> float:
            log_probs = predict(run.scorer, encoded, strategy, batch_size=batch_size)
            return negative_log_likelihood(likelihood.questions(log_probs), labels).item()

        without = nll(MeanPredictive())
        tried: dict[float, float] = {}

        def passes(sigma: float) -> bool:
            tried[sigma] = nll(_noisy(mixers, sigma, samples=SEARCH_SAMPLES, seed=seed))
            return abs(tried[sigma] - without) <= TOLERANCE * without

        sigma = largest_passing(passes, LOW, HIGH, STEPS)
        facts = {
            "sigma": sigma,
            "within_tolerance": abs(tried[sigma] - without) <= TOLERANCE * without,
            "nll_without": without,
            "nll_tried": [{"sigma": s, "nll": value} for s, value in tried.items()],
            "tolerance": TOLERANCE,
            "rows": len(anchor),
        }
        return self.save(run, facts, mixers)

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        facts, mixers = self.facts(run), self.tensors(run)
        return _noisy(mixers, facts["sigma"], samples=samples, seed=seed) if samples else MeanPredictive()

    def extra_numbers(self, run: Run, facts: dict[str, Any], saved: int) -> int:
        return 1  # one scale of noise: what lies beside it follows from B


def noise_mixers(ups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """V diag(1/d) of each B = U diag(d) V^T: B (d_out, r) -> (r, r). What turns unit noise E (r, d_in) into noise on A,
    since B V diag(1/d) E = U E; directions that B does not use get none."""
    found = {}
    for name, b in ups.items():
        _, d, v_transposed = torch.linalg.svd(b.detach().double(), full_matrices=False)
        inverse = torch.where(d > _NEGLIGIBLE * d.max().clamp_min(1e-30), 1 / d.clamp_min(1e-30), 0.0)
        found[name] = (v_transposed.T * inverse).float()
    return found


def largest_passing(passes: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """Bisection for the largest value in [low, high] that passes, where larger ones pass less.

    Returns:
        the largest tried value that passed; `low`, tried last, if none of the others did.
    """
    best, upper = low, high
    for _ in range(steps):
        middle = (best + upper) / 2
        if passes(middle):
            best = middle
        else:
            upper = middle
    if best == low:
        passes(low)
    return best


def _noisy(mixers: Mapping[str, Tensor], sigma: float, *, samples: int, seed: int) -> WeightNoisePredictive:
    def spread(name: str, normal: Tensor) -> Tensor:
        return sigma * (mixers[name.removesuffix(".lora_A")].to(normal) @ normal)

    return WeightNoisePredictive([f"{name}.lora_A" for name in mixers], spread, samples=samples, seed=seed)
