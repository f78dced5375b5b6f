"""What predictions lose where the joint posterior of a plain LoRA is cut down to layers or to single numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from covariance_posterior import RESTRICTIONS, Position
from covariance_study import Made, Study
from torch import Tensor

from scalabl.core.progress import progress_bar
from scalabl.data import Example
from scalabl.inference.evaluation import answers
from scalabl.metrics import Metric, evaluate, ood_auroc, paired_difference, paired_ood_difference
from scalabl.metrics.uncertainty import average, decompose
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive import LinearizedPredictive, MonteCarloPredictive, Predictive, predict
from scalabl.predictive.linearized import logit_jacobian
from scalabl.scoring import Batch, Scorer
from scalabl.training.posthoc.svd import StochasticLeaves

JOINT = ("joint", "marginal")
STRUCTURES = (JOINT, *RESTRICTIONS)
METRICS = ("nll", "ece", "brier", "accuracy")
OOD = ("epistemic", "total")  # uncertainties by which rows of the other task are told apart
LogProbs = dict[str, Tensor]  # "test" and "shifted" -> (N, n, C)


class EveryStructure:
    """Linearised log-probabilities under several covariances from one Jacobian: (1 + K points, B, C).

    The posterior mean comes first, then the points of each covariance behind each other.
    """

    name = "linearized"

    def __init__(self, joints: Sequence[JointGaussian], points: int, seed: int) -> None:
        self.joints = joints
        self.inner = LinearizedPredictive(points, seed=seed)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        logits, jacobians = logit_jacobian(scorer, batch)
        drawn = [self.inner.log_probs(logits, joint.to(scorer.device).push_forward(jacobians)) for joint in self.joints]
        return torch.cat([logits.log_softmax(-1)[None], *drawn])


def predictions(study: Study, at: Position) -> dict[tuple[str, tuple[str, str]], LogProbs]:
    """(predictive, structure) -> log-probabilities, each computed once; ("mean", JOINT) is one pass without noise.

    Monte Carlo takes the first `mc_rows` and `mc_ood_rows` rows. All structures share their standard normal numbers.
    """
    joint, _ = at.exact("evidence")
    joints = [joint.restricted(*structure) for structure in STRUCTURES]  # type: ignore[arg-type]
    o = study.options
    rows = {"test": study.test, "shifted": study.shifted}
    few = {"test": study.test[: o.mc_rows], "shifted": study.shifted[: o.mc_ood_rows]}
    identity = study.identity("mle", study.train)

    def made(
        name: str, strategy: Predictive, of: dict[str, list[Example]], placed: JointGaussian, key: Any
    ) -> LogProbs:
        made_from = [identity, study.identity("mle", *of.values()), key]
        return study.kept(name, made_from, lambda: _predict(study, at, placed, name, strategy, of))[0]

    linearized = EveryStructure(joints, o.points, o.seed)
    whole = made("linearized", linearized, rows, joint, [o.points, o.seed, STRUCTURES])
    found = {("mean", JOINT): {part: log_probs[:1] for part, log_probs in whole.items()}}
    for k, structure in enumerate(STRUCTURES):
        points = slice(1 + k * o.points, 1 + (k + 1) * o.points)
        found["linearized", structure] = {part: log_probs[points] for part, log_probs in whole.items()}
    for structure, placed in zip(STRUCTURES, joints, strict=True):
        if not (o.samples and o.mc_rows):
            break
        name = f"mc-{'-'.join(structure)}"
        strategy = MonteCarloPredictive(o.samples, seed=o.seed)
        found["mc", structure] = made(name, strategy, few, placed, [o.samples, o.seed])
    return found


def _predict(
    study: Study, at: Position, joint: JointGaussian, name: str, strategy: Predictive, of: dict[str, list[Example]]
) -> Made:
    run = study.run("mle")
    found = {}
    with StochasticLeaves(at.factors, joint).in_place(run.scorer.model), progress_bar() as progress:
        for part, rows in of.items():
            # the frozen layers of all rows are stored, of which Monte Carlo takes the first
            encoded = study.encoded(run, study.test if part == "test" else study.shifted)[: len(rows)]
            bar = progress.add_task(f"{name}, {part}", total=len(encoded), detail="")
            found[part] = predict(
                run.scorer,
                encoded,
                strategy,
                batch_size=study.options.batch_size,
                advance=lambda n, bar=bar: progress.advance(bar, n),  # type: ignore[misc]
            )
    return found, {}


def prediction_rows(
    found: dict[tuple[str, tuple[str, str]], LogProbs], test: Sequence[Example], *, bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """A row a predictive, structure and metric: the figure, and its difference to the joint posterior's.

    Intervals are 95 % of the bootstrap over rows; that of a difference is paired.
    """
    labels, rows = answers(test), []
    for (predictive, structure), log_probs in found.items():
        reference = found["linearized" if predictive == "mean" else predictive, JOINT]
        same = log_probs is reference
        probs, others = average(log_probs["test"]), average(reference["test"])
        own = labels[: len(probs)]
        figures: dict[str, tuple[Metric, Metric | None]] = {}
        values = evaluate(probs, own, bootstrap=bootstrap, seed=seed)
        for metric in METRICS:
            gap = None if same else paired_difference(probs, others, own, metric, bootstrap=bootstrap, seed=seed)
            figures[metric] = values[metric], gap
        for kind in OOD:
            if kind == "epistemic" and predictive == "mean":
                continue  # one pass has none
            scores, other = _scores(log_probs, kind), _scores(reference, kind)
            gap = None if same else paired_ood_difference(scores, other, bootstrap=bootstrap, seed=seed)
            figures[f"ood_auroc_{kind}"] = ood_auroc(*scores, bootstrap=bootstrap, seed=seed), gap
        for metric, (value, gap) in figures.items():
            row = {"predictive": predictive, "structure": structure[0], "kept": structure[1], "metric": metric}
            row |= {"rows": len(own), "ood_rows": log_probs["shifted"].shape[1] if metric.startswith("ood") else ""}
            row |= {"value": value.value, "low": value.low, "high": value.high}
            names = ("difference", "difference_low", "difference_high")
            ends = (gap.value, gap.low, gap.high) if gap is not None else (None,) * 3
            rows.append(row | dict(zip(names, ends, strict=True)))
    return rows


def _scores(log_probs: LogProbs, kind: str) -> tuple[Tensor, Tensor]:
    return getattr(decompose(log_probs["test"]), kind), getattr(decompose(log_probs["shifted"]), kind)
