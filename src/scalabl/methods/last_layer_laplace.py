"""Last-layer Laplace (Kristiadi et al. 2020, 2002.10118; Daxberger et al. 2021, 2106.14806): a Gaussian on the weights
of a classification head alone, from the curvature there; A and B stay as they were trained.

    z = W h,   q(W) = N(W_trained, (H + precision I)^-1),   H ~ (sum_n Lambda_n) (x) (1/N sum_n h_n h_n^T)
    Cov z(x) = V diag_j( sum_i (u_i^T h)^2 / (a_i g_j + precision) ) V^T

with h the features that the head's last linear layer reads, and a 1 for its bias if it has one, Lambda_n = diag(p_n) -
p_n p_n^T, and (V, g), (U, a) the eigenvectors and eigenvalues of the two factors. The logits are linear in W, so that
nothing is linearised. The precision is that of the lowest NLL of validation rows among multiples of the one that
maximises the marginal likelihood, which is far too low where a head of many classes has few rows; without validation
rows it is the latter. One pass a row, whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.methods.saved import SavedMethod
from scalabl.posterior.draws import standard_normal
from scalabl.posterior.evidence import best_precision, log_evidence
from scalabl.predictive.base import Predictive
from scalabl.predictive.head_features import head_layer
from scalabl.predictive.kronecker import Factor, KroneckerBlock
from scalabl.predictive.lora_particles import removed_after
from scalabl.runs.method import Run
from scalabl.scoring.base import Batch
from scalabl.scoring.likelihood import log_likelihood
from scalabl.scoring.scorer import Scorer
from scalabl.training.posthoc.precision import index_of_best, tried_precisions
from scalabl.tuner.threads import own

RANK = 4096  # of a factor, beyond which it is kept at this rank
DRAWS = 32  # at least so many, which cost no pass


class LastLayerPredictive:
    """Draws of the logits from the Gaussian that the head's posterior gives them: (N, B, C) log probabilities.

    Args:
        block: the curvature of the head's weights, its bias as a last column.
        precision: of the prior.
        samples: N draws.
        seed: of the draws.
    """

    name = "last_layer_laplace"

    def __init__(self, block: KroneckerBlock, precision: float, *, samples: int = DRAWS, seed: int = 0) -> None:
        self.block = block
        self.precision = precision
        self.samples = samples
        self.seed = seed

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        logits, features = head_features(scorer, batch)
        return scorer.scoring.likelihood.log_probs(self.draws(logits, features))

    def draws(self, logits: Tensor, features: Tensor) -> Tensor:
        """(N, B, C) draws of the logits; logits (B, C) and features (B, k) of the trained head."""
        variances = self.variances(features)
        noise = standard_normal(range(self.samples), logits.shape[1], seed=self.seed, stream="last_layer.logits")
        moved = (noise.to(variances)[:, None, :] * variances.sqrt()) @ self.block.out_vectors.T
        return logits + moved

    def variances(self, features: Tensor) -> Tensor:
        """(B, C) of the logits in the directions of V; features (B, k)."""
        seen = (features @ self.block.in_vectors).square()  # (u_i^T h)^2
        weights = (self.block.eigenvalues + self.precision).reciprocal()  # (C, k)
        # in directions without curvature the prior's variance
        rest = (features.square().sum(dim=-1) - seen.sum(dim=-1)).clamp_min(0)
        return seen @ weights.T + rest[:, None] / self.precision


class LastLayerLaplace(SavedMethod):
    """One pass over the training rows and one over the validation rows, which choose the prior's precision."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
    ) -> dict[str, Any]:
        """The curvature over the training rows, and the prior precision of the lowest NLL of the validation rows; of
        the highest evidence without any.

        Raises:
            UserError: no training rows, or the run has no classification head or is no plain LoRA.
        """
        encoded = self.encoded(run, train_rows, batch_size=batch_size)
        weights = _weights(_head(run.scorer))
        outputs, inputs = (Factor(size, RANK, run.scorer.device) for size in weights.shape)
        likelihood, total = run.scorer.scoring.likelihood, 0.0
        run.scorer.model.eval()
        for _, batch in run.scorer.encoded_batches(encoded, batch_size):
            logits, features = head_features(run.scorer, batch)
            inputs.add(features)
            outputs.add(likelihood.curvature_root(logits).transpose(1, 2).flatten(0, 1))
            total += log_likelihood(likelihood, logits, batch.answers).item()
        (out_vectors, out_values), (in_vectors, in_values) = outputs.eigen(), inputs.eigen()
        block = KroneckerBlock(out_vectors, out_values, in_vectors, in_values / len(encoded))
        squared_norm = weights.double().square().sum().item()
        eigenvalues = block.eigenvalues.double()
        precision = best_precision(squared_norm, [eigenvalues])
        if validation_rows:
            tried = [LastLayerPredictive(block, each, seed=seed) for each in tried_precisions(precision)]

            def predictions(batch: Batch) -> Iterator[Tensor]:
                read = head_features(run.scorer, batch)
                return (likelihood.log_probs(predictive.draws(*read)) for predictive in tried)

            held_out = self.encoded(run, validation_rows, batch_size=batch_size)
            precision = tried[index_of_best(run.scorer, held_out, predictions, batch_size=batch_size)].precision
        evidence = log_evidence(total, squared_norm, [eigenvalues], eigenvalues.new_tensor(precision))
        facts = {
            "prior_precision": precision,
            "log_evidence": evidence.item(),
            "log_likelihood": total,
            "squared_norm": squared_norm,
            "rows": len(train_rows),
        }
        return self.save(run, facts, vars(block))

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        """At least 32 draws of the logits."""
        block = KroneckerBlock(**self.tensors(run))
        return LastLayerPredictive(block, self.facts(run)["prior_precision"], samples=max(samples, DRAWS), seed=seed)


def _head(scorer: Scorer) -> nn.Linear:
    layer = head_layer(scorer.model)
    if layer is None:
        raise UserError(
            "last_layer_laplace is of a classification head, which this run has not; fit subspace_laplace or laplace."
        )
    return layer


def _weights(layer: nn.Linear) -> Tensor:
    """(C, k) the head's weights, its bias as a last column if it has one."""
    parts = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
    return torch.cat(parts, dim=1).detach().float()


def head_features(scorer: Scorer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Class logits (B, C) of a batch, and what the head's last layer read for them (B, k), a 1 behind for its bias."""
    layer = _head(scorer)
    with torch.enable_grad(), _recorded(layer) as passed:
        logits = scorer.class_logits(batch)
        inputs, outputs = passed[-1]
        if outputs.dim() > 2:  # one position of the layer's is a row's: that on which its logits depend
            (gradient,) = torch.autograd.grad(logits.sum(), outputs)
            inputs = inputs[gradient.abs().sum(dim=-1) > 0]
    features = inputs.detach().float()
    if layer.bias is not None:
        features = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    return logits.detach().float(), features


@contextmanager
def _recorded(layer: nn.Linear) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context in which passes leave the layer's inputs and outputs."""
    found: list[tuple[Tensor, Tensor]] = []
    required = layer.weight.requires_grad

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled():  # how the model reads rows is being tried otherwise
            found.append((inputs[0].detach(), output))

    try:
        with removed_after([layer.register_forward_hook(own(hook))]):
            layer.weight.requires_grad_(True)  # outputs need a graph, though no weight is moved
            yield found
    finally:
        layer.weight.requires_grad_(required)
