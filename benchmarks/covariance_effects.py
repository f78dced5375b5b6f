"""What correlations do: to the predictions of a plain LoRA whose joint posterior is cut down to layers or to single
numbers, and to the noise of the ELBO's gradient.

One draw s = s_mu + L z of a row gives g = d(-log p(y | x, s)) / ds, and with it the reparameterised gradients

    log s_mu: s_mu g        log L_ii: L_ii z_i g_i        L_ij, j < i: z_j g_i

A training step averages them over the rows of its batch, each with its own draw, and adds the KL's gradient, which has
no noise. Here a batch is fixed and drawn again and again: what varies is the noise of the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from covariance_posterior import RESTRICTIONS, Made, Position, Study, loaded
from torch import Tensor

from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.inference.predictor import labels_of
from scalabl.metrics import Metric, evaluate, ood_auroc, paired_difference
from scalabl.metrics.bootstrap import check_settings, interval
from scalabl.metrics.figures import ood_separations
from scalabl.metrics.uncertainty import average, decompose
from scalabl.posterior import FullGaussian, Gaussian, standard_normal
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive import LinearizedPredictive, MonteCarloPredictive, Predictive, predict
from scalabl.predictive.linearized import logit_jacobian
from scalabl.runs.method import Run
from scalabl.runs.settings import Settings
from scalabl.scoring import Batch, Encoded, Scorer
from scalabl.training.posthoc.svd import StochasticLeaves
from scalabl.training.run import train
from scalabl.tuner import prior_of, stochastic_layers, values

JOINT = ("joint", "marginal")
STRUCTURES = (JOINT, *RESTRICTIONS)
METRICS = ("nll", "ece", "brier", "accuracy")
OOD = ("epistemic", "total")  # uncertainties by which rows of the other task are separated
LogProbs = dict[str, Tensor]  # "test" and "shifted" -> (N, n, C)
PARAMETERS = {"mean": "log_mean", "std": "log_std", "off-diagonal": "lower"}  # kind -> of a full Gaussian
POSITIONS = ("start", "end")
AT_ONCE = 16  # draws of a row in one pass
Gradients = dict[str, Tensor]  # kind -> (n, K, numbers): rows, draws, and numbers of all layers


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


def paired_ood_difference(
    scores_a: tuple[Tensor, Tensor],
    scores_b: tuple[Tensor, Tensor],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Metric:
    """ood_auroc(a) - ood_auroc(b) on the same rows, with the interval of the paired bootstrap.

    Args:
        scores_a: uncertainties (n,) in and (m,) out of distribution.
        scores_b: another method's, of the same rows.
        bootstrap, seed, confidence: as in `ood_auroc`.

    Raises:
        UserError: the rows are not as many, and as `ood_auroc`.
    """
    check_settings(bootstrap, confidence)
    if [score.shape for score in scores_a] != [score.shape for score in scores_b]:
        raise UserError("The two methods have other numbers of rows, so they cannot be compared row by row.")
    (a, draws_a), (b, draws_b) = (ood_separations(*pair, bootstrap, seed) for pair in (scores_a, scores_b))
    return interval(a - b, draws_a - draws_b, confidence)


def prediction_rows(
    found: dict[tuple[str, tuple[str, str]], LogProbs], test: Sequence[Example], *, bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """A row a predictive, structure and metric: the figure, and its difference to the joint posterior's.

    Intervals are 95 % of the bootstrap over rows; that of a difference is paired.
    """
    labels, rows = labels_of(test), []
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


def s_gradients(
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: int,
    *,
    seed: int,
    shared: bool = False,
    advance: Callable[[int], Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of -log p(y | x, s) in s, and the standard normal numbers that s was made of, (n, K, D) each.

    Args:
        scorer: a model with stochastic layers.
        rows: n encoded rows with answers.
        draws: K.
        seed: of the draws.
        shared: all rows have the same K draws, instead of each its own.
        advance: called with the number of rows done.
    """
    model, n = scorer.model, len(rows)
    layers = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
    gradients, noises = [], []
    was_training = model.training
    model.eval()
    try:
        for i, row in enumerate(rows):
            for first in range(0, draws, AT_ONCE):
                of_draws = range(first, min(first + AT_ONCE, draws))
                numbers = [k if shared else k * n + i for k in of_draws]
                noise = {name: standard_normal(numbers, r, seed=seed, stream=name) for name, r in layers.items()}
                batch = scorer.with_trunk(scorer.scoring.collate([row] * len(numbers)).to(scorer.device))
                with torch.enable_grad(), values(model, len(numbers)) as made:
                    for name, (s, posterior) in made.items():
                        with torch.no_grad():
                            s += posterior.perturb(noise[name].to(s))
                    log_probs = scorer.class_log_probs(batch).gather(-1, batch.answers[:, None])
                    found = torch.autograd.grad(-log_probs.sum(), [s for s, _ in made.values()])
                gradients.append(torch.cat(found, dim=1).float().cpu())
                noises.append(torch.cat(list(noise.values()), dim=1))
            if advance is not None:
                advance(1)
    finally:
        model.train(was_training)
    return torch.cat(gradients).unflatten(0, (n, draws)), torch.cat(noises).unflatten(0, (n, draws))


@torch.no_grad()
def parameter_gradients(posteriors: Sequence[FullGaussian], gradient: Tensor, noise: Tensor) -> Gradients:
    """The gradients in each kind of parameter from those in s: one of each row and draw, float64."""
    found: dict[str, list[Tensor]] = {kind: [] for kind in PARAMETERS}
    sizes = [posterior.r for posterior in posteriors]
    parts = zip(posteriors, gradient.double().split(sizes, -1), noise.double().split(sizes, -1), strict=True)
    for posterior, g, z in parts:
        rows, columns = torch.tril_indices(posterior.r, posterior.r, offset=-1)
        found["mean"].append(g * posterior.mean.double().cpu())
        found["std"].append(g * z * posterior.log_std.double().exp().cpu())
        found["off-diagonal"].append(g[..., rows] * z[..., columns])
    return {kind: torch.cat(of_layers, dim=-1) for kind, of_layers in found.items()}


def kl_gradients(posteriors: Iterable[Gaussian], run: Run, weight: float) -> dict[str, Tensor]:
    """The gradient of weight * KL(q || p) in each kind of parameter, (numbers,)."""
    of_layers = [posterior.kl_gradient(prior_of(run.scorer.model)) for posterior in posteriors]
    return {
        kind: weight * torch.cat([layer[name].double().cpu() for layer in of_layers])
        for kind, name in PARAMETERS.items()
    }


def figures(of_rows: Gradients, kl: dict[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A fixed batch's figures by kind of parameter, and each parameter's |mean| / std over draws.

    signal: root mean square over the parameters of the expected gradient, freed of what the mean over K draws has of
    noise; noise: of the standard deviation over draws, and of that over rows, had the batch other rows; snr: signal /
    noise of the draws; median_ratio: median of |mean| / std, and what it would be where nothing but noise is seen;
    noise_share, signal_share: of all parameters' squares.

    Args:
        of_rows: gradients (B, K, numbers) of the rows of one batch, at least two rows and draws.
        kl: its gradient, (numbers,).
    """
    found, ratios = [], {}
    for kind, each in of_rows.items():
        rows, draws, number = each.shape
        if number == 0:
            continue
        estimates = each.mean(dim=0) + kl[kind]
        mean, variance = estimates.mean(dim=0), estimates.var(dim=0)
        signal = (mean.square() - variance / draws).mean().clamp_min(0)
        between = (each.mean(dim=1).var(dim=0) - each.var(dim=1).mean(dim=0) / draws).mean().clamp_min(0) / rows
        ratios[kind] = mean.abs() / variance.sqrt().clamp_min(1e-300)
        row = {"kind": kind, "numbers": number, "signal": signal.sqrt().item()}
        row |= {"noise_of_draws": variance.mean().sqrt().item(), "noise_of_rows": between.sqrt().item()}
        row["snr"] = row["signal"] / row["noise_of_draws"] if row["noise_of_draws"] > 0 else None
        row["median_ratio"] = ratios[kind].median().item()
        row["median_ratio_of_noise"] = 0.6745 / draws**0.5  # the median of |N(0, 1)| over sqrt(K)
        found.append(row)
    for share, of in (("noise_share", "noise_of_draws"), ("signal_share", "signal")):
        whole = sum(row["numbers"] * row[of] ** 2 for row in found)
        for row in found:
            row[share] = row["numbers"] * row[of] ** 2 / whole if whole > 0 else None
    return found, ratios


def noise_rows(study: Study) -> tuple[list[dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """A row a position, batch and kind of parameter; and position -> kind -> the ratios of all batches."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, list[Tensor]]] = {}
    o = study.options
    for where in POSITIONS:
        made_from = [study.identity("full", study.train), o.draws, o.seed, o.batches, o.noise_batch]
        made_from += [o.start_steps] if where == "start" else []
        tensors, _ = study.kept(f"gradients-{where}", made_from, lambda where=where: _gradients(study, where))  # type: ignore[misc]
        for batch in range(o.batches):
            chosen = slice(batch * o.noise_batch, (batch + 1) * o.noise_batch)
            of_rows = {kind: tensors[kind][chosen].double() for kind in PARAMETERS}
            found, of_batch = figures(of_rows, {kind: tensors[f"kl|{kind}"] for kind in PARAMETERS})
            rows += [{"position": where, "batch": batch} | row for row in found]
            for kind, values_ in of_batch.items():
                ratios.setdefault(where, {}).setdefault(kind, []).append(values_)
    return rows, {where: {kind: torch.cat(all_) for kind, all_ in of.items()} for where, of in ratios.items()}


def _gradients(study: Study, where: str) -> Made:
    o, settings = study.options, study.settings("full")
    run = study.run("full") if where == "end" else _start(study, settings)
    rows = study.encoded(run, study.train)[: o.batches * o.noise_batch]
    with progress_bar() as progress:
        bar = progress.add_task(f"gradients, {where}", total=len(rows), detail="")
        gradient, noise = s_gradients(
            run.scorer, rows, o.draws, seed=o.seed, shared=settings.posterior.draws == "batch",
            advance=lambda n: progress.advance(bar, n),
        )  # fmt: skip
    posteriors: list[Any] = [leaf.posterior for leaf in stochastic_layers(run.scorer.model).values()]
    weight = settings.posterior.beta / study.records["full"].rows["train"]
    found = {kind: each.float() for kind, each in parameter_gradients(posteriors, gradient, noise).items()}
    return found | {f"kl|{kind}": each for kind, each in kl_gradients(posteriors, run, weight).items()}, {}


def _start(study: Study, settings: Settings) -> Run:
    """A run of a few steps of the same recipe, on the rows that this study knows.

    At the very first step B is 0, and with it every gradient in s.
    """
    o, scoring = study.options, study.records["full"].scoring
    limit = min(o.train_rows, study.records["full"].rows["train"])
    short = settings.changed(
        steps=o.start_steps, train_rows=limit, validation_rows=0, model=o.model or settings.model,
        scoring=scoring["scoring"], normalization=scoring.get("normalization", "auto"),
    )  # fmt: skip
    directory = o.work / f"start-{o.start_steps}-{study.records['full'].adapter_sha256[:12]}-{limit}"
    train(short, directory)
    return loaded(directory, o.model)
