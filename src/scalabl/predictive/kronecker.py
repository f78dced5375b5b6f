"""The Kronecker-factored Gauss-Newton matrix of class logits in LoRA's weights (Martens and Grosse 2015, 1503.05671).

With J_n the Jacobian of row n's class logits in one weight matrix W, and Lambda_n = diag(p_n) - p_n p_n^T (of several
labels a row diag(p_n (1 - p_n))),

    H = sum_n J_n^T Lambda_n J_n  ~  (sum_nk,t g g^T) (x) (1/N sum_n,t a a^T)               [Yang et al. 2024]

where t runs over the tokens, a are W's inputs, and g_nk,t are the gradients at its outputs of the k-th number of
M_n^T f_n, with M_n M_n^T = Lambda_n. It is exact for one row of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.predictive.lora_particles import lora_matrices, removed_after
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.likelihood import log_likelihood
from scalabl.scoring.read_token import whole_rows
from scalabl.scoring.reading import reads_packed
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.threads import own


@dataclass
class Recorded:
    """What passed through one weight matrix in a forward pass: inputs (B, T, d_in) and outputs (B, T, d_out)."""

    inputs: Tensor
    outputs: Tensor


def require_one_pass(model: nn.Module, batch: Batch) -> None:
    """Refuse a model that takes a batch in several passes, of other shapes than the batch.

    Raises:
        UserError: it does.
    """
    if not reads_packed(model, batch):
        raise UserError(
            "This method takes the curvature of rows under a mask that keeps padding and choices apart, which this "
            "model does not honour; fit another one, for instance temperature."
        )


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, Recorded]]:
    """Context in which a forward pass leaves its inputs and outputs at every A and B, by "LAYER.lora_A" and so on."""
    found: dict[str, Recorded] = {}
    modules = lora_matrices(model)
    required = {name: module.weight.requires_grad for name, module in modules.items()}

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():  # how the model reads rows is being tried
                return
            if name in found:
                raise UserError(f"{name} is applied twice in a pass, so that its curvature is not known here; fit tfb.")
            found[name] = Recorded(inputs[0].detach(), output)

        return hook

    try:
        hooks = [module.register_forward_hook(own(hook_of(name))) for name, module in modules.items()]
        with removed_after(hooks), whole_rows():
            for module in modules.values():
                module.weight.requires_grad_(True)  # outputs need a graph, though no weight is moved
            yield found
    finally:
        for name, module in modules.items():
            module.weight.requires_grad_(required[name])


def output_gradients(class_logits: Tensor, coefficients: Tensor, passed: dict[str, Recorded]) -> dict[str, Tensor]:
    """Gradients at the outputs of every weight matrix, of K weighted sums of each row's class logits.

    Args:
        class_logits: (B, C), -inf for missing choices.
        coefficients: (B, C, K) weights of the sums.
        passed: what was recorded in the pass that gave the logits.

    Returns:
        (K, B, T, d_out) by the matrix's name, float32.
    """
    logits = torch.where(class_logits.isfinite(), class_logits, 0.0)
    outputs = [record.outputs for record in passed.values()]
    number = coefficients.shape[-1]
    parts: list[tuple[Tensor | None, ...]] = []
    for k in range(number):
        # rows do not see each other, so that the sum's gradient holds every row's own
        total = (logits * coefficients[:, :, k]).sum()
        parts.append(torch.autograd.grad(total, outputs, retain_graph=k + 1 < number, allow_unused=True))
    return {
        name: torch.stack([torch.zeros_like(out) if part[i] is None else part[i] for part in parts]).float()  # type: ignore[misc, arg-type]
        for i, (name, out) in enumerate(zip(passed, outputs, strict=True))
    }


def jacobians(class_logits: Tensor, passed: dict[str, Recorded]) -> dict[str, Tensor]:
    """The Jacobian of every row's class logits in every weight matrix: (B, C, d_out, d_in) by the matrix's name."""
    rows, classes = class_logits.shape
    each = torch.eye(classes, device=class_logits.device).expand(rows, -1, -1)
    gradients = output_gradients(class_logits, each, passed)
    return {name: torch.einsum("kbto,bti->bkoi", g, passed[name].inputs.float()) for name, g in gradients.items()}


class Factor:
    """A running sum of x x^T over vectors x of d numbers, exact up to a size and of a given rank beyond it.

    Args:
        size: d.
        rank: how many directions are kept where d is larger; the rest of the sum is dropped, which leaves the prior
            there (the low-rank representation of Yang et al. 2024, appendix).
        device: where it is kept.
    """

    def __init__(self, size: int, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.exact = size <= rank
        self._sum = torch.zeros(size, size, device=device) if self.exact else torch.zeros(0, size, device=device)

    def add(self, vectors: Tensor) -> None:
        """Add vectors (m, d)."""
        if self.exact:
            self._sum += vectors.T @ vectors
            return
        self._sum = torch.cat([self._sum, vectors])
        if self._sum.shape[0] > 2 * self.rank:  # seldom: an eigendecomposition costs more than a product
            self._shrink()

    def _shrink(self) -> None:
        """Keep the `rank` largest directions of S^T S, S the rows kept so far."""
        rows = self._sum.double()  # singular Gram matrices defeat the solver in single precision
        if rows.shape[0] <= rows.shape[1]:
            _, left = torch.linalg.eigh(rows @ rows.T)
            rows = left[:, -self.rank :].T @ rows  # the rows of S^T U: singular values times right vectors
        else:
            values, right = torch.linalg.eigh(rows.T @ rows)
            rows = values[-self.rank :].clamp_min(0).sqrt()[:, None] * right[:, -self.rank :].T
        self._sum = rows.float()

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors (d, k) as columns and eigenvalues (k,), at least 0."""
        if self.exact:
            values, vectors = torch.linalg.eigh(self._sum.double())
        else:
            self._shrink()
            left, singular, _ = torch.linalg.svd(self._sum.double().T, full_matrices=False)
            vectors, values = left, singular.square()
        return vectors.float(), values.clamp_min(0).float()


@dataclass(frozen=True)
class KroneckerBlock:
    """The curvature of one weight matrix (d_out, d_in) in eigenvectors: (V_out L_out V_out^T) (x) (V_in L_in V_in^T).

    Attributes:
        out_vectors: (d_out, k_out).
        out_values: (k_out,).
        in_vectors: (d_in, k_in).
        in_values: (k_in,).
    """

    out_vectors: Tensor
    out_values: Tensor
    in_vectors: Tensor
    in_values: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """(k_out, k_in) those that are not zero by construction."""
        return torch.outer(self.out_values, self.in_values)

    def logit_covariances(self, jacobian: Tensor, precisions: Sequence[float]) -> Tensor:
        """J (H + precision I)^-1 J^T under each of P precisions: (B, C, d_out, d_in) -> (P, B, C, C)."""
        inside = self.out_vectors.T @ jacobian @ self.in_vectors
        shrunk = ((inside / (self.eigenvalues + each).sqrt()).flatten(2) for each in precisions)  # one in memory
        covariances = torch.stack([each @ each.transpose(1, 2) for each in shrunk])
        if inside.shape != jacobian.shape:  # directions without curvature keep the prior's variance
            outside = (jacobian - self.out_vectors @ inside @ self.in_vectors.T).flatten(2)
            prior = torch.tensor(precisions, device=outside.device).view(-1, 1, 1, 1)
            covariances = covariances + outside @ outside.transpose(1, 2) / prior
        return covariances


@dataclass(frozen=True)
class KroneckerCurvature:
    """The curvature of all weight matrices by name, with the log-likelihood (nats) of the rows it was summed over."""

    blocks: dict[str, KroneckerBlock]
    log_likelihood: float


def gauss_newton(
    scorer: Scorer,
    rows: Sequence[Encoded],
    *,
    rank: int,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
) -> KroneckerCurvature:
    """The Kronecker-factored Gauss-Newton matrix over rows.

    Args:
        scorer: the model with its scoring, at the adapter's weights.
        rows: encoded rows with answers.
        rank: factors of up to so many dimensions are exact, larger ones are kept at this rank.
        batch_size: rows at a time; the sum does not depend on it.
        advance: called with the number of rows done.
    """
    modules = lora_matrices(scorer.model)
    device = scorer.device
    inputs = {name: Factor(module.weight.shape[1], rank, device) for name, module in modules.items()}
    outputs = {name: Factor(module.weight.shape[0], rank, device) for name, module in modules.items()}
    likelihood, total = scorer.scoring.likelihood, 0.0
    scorer.model.eval()
    for indices, batch in scorer.encoded_batches(rows, batch_size):
        require_one_pass(scorer.model, batch)
        with torch.enable_grad(), recorded(scorer.model) as passed:
            class_logits = scorer.class_logits(batch)
            root = likelihood.curvature_root(class_logits.detach())
            gradients = output_gradients(class_logits, root, passed)
        total += log_likelihood(likelihood, class_logits.detach(), batch.answers).item()
        for name, record in passed.items():
            real = is_real(batch, record.inputs.shape[1])
            inputs[name].add(record.inputs[real].float())
            outputs[name].add(gradients[name][:, real].flatten(0, 1))
        if advance is not None:
            advance(len(indices))
    blocks = {}
    for name in modules:
        (out_vectors, out_values), (in_vectors, in_values) = outputs[name].eigen(), inputs[name].eigen()
        blocks[name] = KroneckerBlock(out_vectors, out_values, in_vectors, in_values / len(rows))
    return KroneckerCurvature(blocks, total)


def is_real(batch: Batch, length: int) -> Tensor:
    """(B, length) whether each of the last positions is a token rather than padding."""
    return batch.segments[:, -length:] >= 0
