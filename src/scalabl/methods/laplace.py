"""Laplace-LoRA (Yang et al. 2024, 2308.13111): a Gaussian around the trained A and B, from the curvature there.

    q(theta) = N(theta_MAP, (H + precision I)^-1),   H the Kronecker-factored Gauss-Newton matrix of the training rows
    f(x) ~ N(f_MAP(x), J (H + precision I)^-1 J^T),   p(y | x) = E[softmax f(x)]

The precision maximises the marginal likelihood [as published]; where there are validation rows it is the multiple of
that one under which their NLL is lowest. One forward pass and C backward passes a row give the logits' mean and
covariance; the softmax's average is taken over fixed draws of the logits, or by the probit approximation. A
classification head is known: it stays at its trained weights, and A and B are what is uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.methods.saved import SavedMethod
from scalabl.posterior.draws import standard_normal
from scalabl.posterior.evidence import best_precision, log_evidence
from scalabl.predictive.base import Predictive
from scalabl.predictive.kronecker import KroneckerBlock, gauss_newton, jacobians, recorded, require_one_pass
from scalabl.predictive.lora_particles import lora_matrices
from scalabl.runs.method import Run
from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer
from scalabl.training.posthoc.precision import index_of_best, tried_precisions

# the most choices that a row of a question can have: a particle's noise does not depend on what stands beside the row
_CLASSES = 26
_JITTER = 1e-6


class LinearizedLaplacePredictive:
    """The predictive of Laplace-LoRA.

    Args:
        blocks: the curvature of every A and B by name.
        precision: of the prior.
        samples: N draws of the logits (they cost no pass); not read by "probit".
        seed: of the draws.
        link: "sample" averages softmax over draws of the joint Gaussian, "probit" scales each logit by
            1 / sqrt(1 + pi/8 var) and gives one particle (MacKay 1992).

    Raises:
        UserError: samples is below 1, or there is no such link.
    """

    name = "laplace"

    def __init__(
        self,
        blocks: Mapping[str, KroneckerBlock],
        precision: float,
        *,
        samples: int = 1000,
        seed: int = 0,
        link: Literal["sample", "probit"] = "sample",
    ) -> None:
        if samples < 1:
            raise UserError(f"samples is {samples}; it must be at least 1.")
        if link not in ("sample", "probit"):
            raise UserError(f"link is {link!r}; it must be sample or probit.")
        self.blocks = blocks
        self.precision = precision
        self.samples = samples
        self.link = link
        self.seed = seed
        self._drawn = torch.empty(samples, 0)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return self.log_probs(scorer, *self.logit_distribution(scorer, batch))

    def log_probs(self, scorer: Scorer, mean: Tensor, covariance: Tensor) -> Tensor:
        """(N, B, C) log probabilities of Gaussian logits, mean (B, C) and covariance (B, C, C)."""
        likelihood = scorer.scoring.likelihood
        if self.link == "probit":
            variance = covariance.diagonal(dim1=1, dim2=2)
            return likelihood.log_probs(mean / (1 + math.pi / 8 * variance).sqrt())[None]
        classes = mean.shape[1]
        size = covariance.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-12)
        jitter = _JITTER * size[:, None, None] * torch.eye(classes, device=mean.device)
        root = torch.linalg.cholesky(covariance.double() + jitter.double()).float()
        noise = self._noise(classes)[:, :classes].to(mean.device)
        return likelihood.log_probs(mean + torch.einsum("bcd,nd->nbc", root, noise))

    def _noise(self, classes: int) -> Tensor:
        """(N, C) standard normal noise, the same for every row; a head has the same number of classes in all."""
        width = max(_CLASSES, classes)
        if self._drawn.shape[1] != width:
            self._drawn = standard_normal(range(self.samples), width, seed=self.seed, stream="laplace.logits")
        return self._drawn

    def logit_distribution(self, scorer: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Class logits (B, C), -inf for missing choices, and their covariance (B, C, C), 0 there."""
        logits, covariances = logit_distributions(scorer, batch, self.blocks, [self.precision])
        return logits, covariances[0]


def logit_distributions(
    scorer: Scorer, batch: Batch, blocks: Mapping[str, KroneckerBlock], precisions: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Class logits (B, C), -inf for missing choices, and their covariance under each precision (P, B, C, C)."""
    require_one_pass(scorer.model, batch)
    with torch.enable_grad(), recorded(scorer.model) as passed:
        class_logits = scorer.class_logits(batch)
        of_weights = jacobians(class_logits, passed)
    parts = [blocks[name].logit_covariances(jacobian, precisions) for name, jacobian in of_weights.items()]
    return class_logits.detach().float(), torch.stack(parts).sum(dim=0)


# factors of up to so many dimensions are exact; larger ones are kept at this rank
RANK = 2048
# draws of the logits cost no forward pass (the paper takes 100,000)
DRAWS = 1000


class LaplaceLoRA(SavedMethod):
    """Fitted by one pass over the training rows and one over the validation rows; predicts with draws of the logits."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
        rank: int = RANK,
    ) -> dict[str, Any]:
        """The curvature over the training rows, and the prior precision of the lowest NLL of the validation rows; of
        the highest evidence without any.

        Raises:
            UserError: no training rows, or the run is no plain LoRA.
        """
        encoded = self.encoded(run, train_rows, batch_size=batch_size)
        with progress_bar() as progress:
            bar = progress.add_task("curvature", total=len(encoded), detail="")
            curvature = gauss_newton(
                run.scorer, encoded, rank=rank, batch_size=batch_size, advance=lambda n: progress.advance(bar, n)
            )
        weights = [matrix.weight.detach().double() for matrix in lora_matrices(run.scorer.model).values()]
        squared_norm = sum(weight.square().sum().item() for weight in weights)
        eigenvalues = [block.eigenvalues.double() for block in curvature.blocks.values()]
        precision = best_precision(squared_norm, eigenvalues)
        if validation_rows:
            predictive = LinearizedLaplacePredictive(curvature.blocks, precision, samples=DRAWS, seed=seed)
            tried = tried_precisions(precision)

            def predictions(batch: Batch) -> Iterator[Tensor]:
                logits, covariances = logit_distributions(run.scorer, batch, curvature.blocks, tried)
                return (predictive.log_probs(run.scorer, logits, covariance) for covariance in covariances)

            held_out = self.encoded(run, validation_rows, batch_size=batch_size)
            precision = tried[index_of_best(run.scorer, held_out, predictions, batch_size=batch_size)]
        evidence = log_evidence(
            curvature.log_likelihood, squared_norm, eigenvalues, eigenvalues[0].new_tensor(precision)
        )
        facts = {
            "prior_precision": precision,
            "log_evidence": evidence.item(),
            "log_likelihood": curvature.log_likelihood,
            "squared_norm": squared_norm,
            "rows": len(train_rows),
            "rank": rank,
        }
        tensors = {f"{name}|{k}": v for name, block in curvature.blocks.items() for k, v in vars(block).items()}
        return self.save(run, facts, tensors)

    def predictive(
        self, run: Run, *, samples: int = 10, seed: int = 0, link: Literal["sample", "probit"] = "sample"
    ) -> Predictive:
        """The linearised predictive, over at least 1,000 draws of the logits."""
        facts, tensors = self.facts(run), self.tensors(run)
        names = dict.fromkeys(key.rsplit("|", 1)[0] for key in tensors)
        blocks = {
            name: KroneckerBlock(**{k: tensors[f"{name}|{k}"] for k in KroneckerBlock.__dataclass_fields__})
            for name in names
        }
        return LinearizedLaplacePredictive(
            blocks, facts["prior_precision"], samples=max(samples, DRAWS), seed=seed, link=link
        )
