"""Laplace-LoRA (Yang et al. 2024, 2308.13111): a Gaussian around the trained A and B, from the curvature there.

q(theta) = N(theta_MAP, (H + precision I)^-1),   H the Kronecker-factored Gauss-Newton matrix of the training rows
precision: maximises the marginal likelihood, 100 steps of Adam at 0.1
f(x) ~ N(f_MAP(x), J (H + precision I)^-1 J^T),   p(y | x) = E[softmax f(x)]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scalabl.methods.evidence import best_precision, log_evidence
from scalabl.methods.saved import load_facts, load_tensors, save
from scalabl.methods.training_rows import encoded_training_rows
from scalabl.predictive import Predictive
from scalabl.predictive.kronecker import Block, gauss_newton, matrices
from scalabl.predictive.linearized_laplace import LinearizedLaplacePredictive
from scalabl.progress import progress_bar
from scalabl.tasks import Example

if TYPE_CHECKING:
    from scalabl.loading import Run

TITLE = "Laplace-LoRA"
# factors of up to so many dimensions are exact; larger ones are kept at this rank
RANK = 2048
# draws of the logits cost no forward pass (the paper takes 100,000)
DRAWS = 1000


def fit(
    run: Run,
    train_rows: Sequence[Example],
    validation_rows: Sequence[Example],
    *,
    members: Sequence[Path] = (),
    batch_size: int = 8,
    seed: int = 0,
    rank: int = RANK,
) -> dict[str, Any]:
    """The curvature over the training rows, and the prior precision of the highest evidence.

    Raises:
        UserError: no training rows, or the run is no plain LoRA.
    """
    encoded = encoded_training_rows(run, "laplace", train_rows, batch_size=batch_size)
    with progress_bar() as progress:
        bar = progress.add_task("curvature", total=len(encoded), detail="")
        curvature = gauss_newton(
            run.scorer, encoded, rank=rank, batch_size=batch_size, advance=lambda n: progress.advance(bar, n)
        )
    squared_norm = sum(m.weight.detach().double().square().sum().item() for m in matrices(run.scorer.model).values())
    eigenvalues = [block.eigenvalues.double() for block in curvature.blocks.values()]
    precision = best_precision(squared_norm, eigenvalues)
    evidence = log_evidence(curvature.log_likelihood, squared_norm, eigenvalues, eigenvalues[0].new_tensor(precision))
    facts = {
        "prior_precision": precision,
        "log_evidence": evidence.item(),
        "log_likelihood": curvature.log_likelihood,
        "squared_norm": squared_norm,
        "rows": len(train_rows),
        "rank": rank,
    }
    tensors = {f"{name}|{k}": v for name, block in curvature.blocks.items() for k, v in vars(block).items()}
    return save(run, "laplace", facts, tensors)


def predictive(
    run: Run, *, samples: int = 10, seed: int = 0, link: Literal["sample", "probit"] = "sample"
) -> Predictive:
    """The linearised predictive, over at least 1,000 draws of the logits."""
    facts, tensors = load_facts(run, "laplace"), load_tensors(run, "laplace")
    names = dict.fromkeys(key.rsplit("|", 1)[0] for key in tensors)
    blocks = {name: Block(**{k: tensors[f"{name}|{k}"] for k in Block.__dataclass_fields__}) for name in names}
    return LinearizedLaplacePredictive(
        blocks, facts["prior_precision"], samples=max(samples, DRAWS), seed=seed, link=link
    )
