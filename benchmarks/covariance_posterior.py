"""The exact Gauss-Newton posterior of s at a run's weights, and how far it is from having no correlations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from covariance_study import Made, Study
from torch import Tensor

from scalabl.core.progress import progress_bar
from scalabl.posterior import FullGaussian
from scalabl.posterior.joint import JointGaussian
from scalabl.training.posthoc.laplace import JointCurvature, gauss_newton, posterior_of, used_components
from scalabl.training.posthoc.svd import Factors, StochasticLeaves, factors_of
from scalabl.tuner import prior_of, stochastic_layers
from scalabl.tuner.layers import depths

# which prior each run's exact posterior has; the first is the one that pictures show
PRIORS = {"mle": ("evidence",), "diagonal": ("own", "evidence"), "full": ("own", "evidence")}
RESTRICTIONS = (("layer", "marginal"), ("layer", "conditional"), ("diagonal", "marginal"), ("diagonal", "conditional"))
KINDS = ("within a layer", "same decoder layer", "other decoder layers")


@dataclass(frozen=True, eq=False)
class Position:
    """A run's weights and the curvature there.

    Attributes:
        curvature: H in the run's own s, scaled from the rows it was summed over to all training rows.
        depth: the layer's name -> its decoder layer.
        mean: (D,) s_mu; 1 for a plain LoRA, whose s are relative strengths.
        components: how many numbers have an effect.
        precision: (D,) of the run's own prior; None for a plain LoRA.
        learnt: the covariance that the run found; None for a plain LoRA.
        factors: a plain LoRA's SVD by layer.
        beta: the multiplier of the KL that the run was trained with.
    """

    curvature: JointCurvature
    depth: dict[str, int]
    mean: Tensor
    components: int
    precision: Tensor | None
    learnt: JointGaussian | None
    factors: dict[str, Factors]
    beta: float

    def exact(self, prior: str) -> tuple[JointGaussian, dict[str, Any]]:
        """The Gaussian of precision H / beta + prior precision, which is where the ELBO of a quadratic loss is highest.

        Args:
            prior: "own", the run's own on s; or "evidence", that of the highest evidence on the relative strengths
                s / s_mu, which is what `scalabl bayesianize` takes. Correlations and divergences are the same in s and
                in relative strengths.

        Returns:
            the Gaussian, and facts: prior_std (of the relative strengths; a mean over the numbers), numbers,
            effective_parameters (tr(H Sigma)), log_likelihood (a mean over the rows).
        """
        matrix = torch.outer(self.mean, self.mean) * self.curvature.matrix
        if prior == "evidence":
            relative = JointCurvature(matrix, self.curvature.ranks, self.curvature.log_likelihood, self.curvature.rows)
            joint, facts = posterior_of(relative, self.components)
            precision = torch.full_like(self.mean, facts["prior_precision"])
        else:
            assert self.precision is not None
            precision = self.precision * self.mean.square()
            eigenvalues, vectors = torch.linalg.eigh(matrix / self.beta + torch.diag(precision))
            joint = JointGaussian.from_precision(
                eigenvalues.clamp_min(precision.min().item()), vectors, self.curvature.ranks
            )
        return joint, {
            "prior_std": precision.rsqrt().mean().item(),
            "numbers": joint.size,
            "effective_parameters": joint.size - (precision * joint.covariance().diagonal()).sum().item(),
            "log_likelihood": self.curvature.log_likelihood / self.curvature.rows,
        }

    def learnt_relative(self, correlated: bool = True) -> JointGaussian:
        """What the run found, in relative strengths as `exact` is; with its correlations or without."""
        assert self.learnt is not None
        factor = self.learnt.factor.double() / self.mean[:, None]
        joint = JointGaussian(factor.float(), self.learnt.ranks)
        return joint if correlated else joint.restricted("diagonal")


def position(study: Study, name: str) -> Position:
    """A run's position, computed once."""
    tensors, facts = study.kept(f"curvature-{name}", study.identity(name, study.train), lambda: _curvature(study, name))
    ranks: dict[str, int] = facts["ranks"]
    scale = study.records[name].rows["train"] / len(study.train)
    curvature = JointCurvature(
        scale * tensors["matrix"], ranks, scale * facts["log_likelihood"], study.records[name].rows["train"]
    )
    learnt = JointGaussian(tensors["learnt"], ranks) if "learnt" in tensors else None
    factors = {layer: Factors(tensors[f"{layer}|rows"], tensors[f"{layer}|up"]) for layer in ranks if learnt is None}
    return Position(
        curvature,
        facts["depth"],
        tensors["mean"],
        facts["components"],
        tensors.get("precision"),
        learnt,
        factors,
        study.recipe(name).posterior.beta,
    )


def _curvature(study: Study, name: str) -> Made:
    run = study.run(name)
    model, rows = run.scorer.model, study.encoded(run, study.train)

    def summed() -> JointCurvature:
        with progress_bar() as progress:
            bar = progress.add_task(f"curvature, {name}", total=len(rows), detail="")
            return gauss_newton(
                run.scorer, rows, batch_size=study.options.batch_size, advance=lambda n: progress.advance(bar, n)
            )

    tensors: dict[str, Tensor] = {}
    if not run.is_bayesian:
        leaves = StochasticLeaves(factors_of(model))
        with leaves.in_place(model):
            curvature, components = summed(), used_components(run.scorer)
        tensors["mean"] = torch.ones(len(curvature.matrix), dtype=torch.float64)
        # singular vectors of like values may turn out otherwise the next time
        for layer, factors in leaves.factors.items():
            tensors |= {f"{layer}|rows": factors.rows, f"{layer}|up": factors.up}
    else:
        curvature = summed()
        posteriors = [leaf.posterior for leaf in stochastic_layers(model).values()]
        prior = prior_of(model)
        with torch.no_grad():
            tensors["mean"] = torch.cat([p.mean for p in posteriors]).double().cpu()
            variances = [prior.variance(p.mean, p.marginal_std().square()).expand(p.r) for p in posteriors]
            tensors["precision"] = torch.cat(variances).double().cpu().reciprocal()
            own = [p.cholesky() if isinstance(p, FullGaussian) else torch.diag(p.marginal_std()) for p in posteriors]
            of_layers = dict(zip(curvature.ranks, (factor.cpu() for factor in own), strict=True))
            tensors["learnt"] = JointGaussian.of_layers(of_layers).factor
        components = len(tensors["mean"])
    facts = {
        "ranks": curvature.ranks,
        "depth": depths(model, curvature.ranks),
        "components": components,
        "log_likelihood": curvature.log_likelihood,
    }
    return {**tensors, "matrix": curvature.matrix}, facts


def pairs(ranks: Mapping[str, int], depth: Mapping[str, int]) -> dict[str, Tensor]:
    """Kind of pair -> (D, D) bool, True once for every pair of numbers of this kind."""
    sizes = torch.tensor(list(ranks.values()))
    layer = torch.arange(len(ranks)).repeat_interleave(sizes)
    decoder = torch.tensor([depth[name] for name in ranks]).repeat_interleave(sizes)
    once = torch.ones(len(layer), len(layer), dtype=torch.bool).triu(1)
    same, beside = layer[:, None] == layer, decoder[:, None] == decoder
    return dict(zip(KINDS, (once & same, once & ~same & beside, once & ~beside), strict=True))


def correlation_rows(joint: JointGaussian, depth: Mapping[str, int]) -> list[dict[str, Any]]:
    """The sizes of the correlations by kind of pair; kinds without a pair are left out."""
    size, found = joint.correlation().abs(), []
    for kind, mask in pairs(joint.ranks, depth).items():
        values = size[mask]
        if len(values):
            quantiles = torch.quantile(values, torch.tensor([0.5, 0.9, 0.99], dtype=values.dtype)).tolist()
            row = {"pairs": kind, "number": len(values), "rms": values.square().mean().sqrt().item()}
            row |= dict(zip(("median", "quantile_90", "quantile_99"), quantiles, strict=True))
            row |= {"largest": values.max().item()}
            found.append(row | {f"above_{t}": (values > t).double().mean().item() for t in (0.1, 0.3, 0.5)})
    return found


def divergence_rows(joint: JointGaussian) -> list[dict[str, Any]]:
    """KL in nats between the exact posterior p and each restriction q of it, both ways."""
    found = []
    for structure, kept in RESTRICTIONS:
        q = joint.restricted(structure, kept)  # type: ignore[arg-type]
        row = {"structure": structure, "kept": kept, "kl_p_q": joint.kl(q), "kl_q_p": q.kl(joint)}
        found.append(row | {"std_ratio": _std_ratio(q, joint)})
    return found


def _std_ratio(q: JointGaussian, p: JointGaussian) -> float:
    """Mean over the numbers of the standard deviation in q, as a share of that in p."""
    return (q.covariance().diagonal() / p.covariance().diagonal()).sqrt().mean().item()


def posterior_tables(positions: Mapping[str, Position]) -> dict[str, list[dict[str, Any]]]:
    """The tables "posterior", "correlations" and "divergences" of all runs and priors."""
    tables: dict[str, list[dict[str, Any]]] = {"posterior": [], "correlations": [], "divergences": []}
    for name, priors in PRIORS.items():
        for prior in priors:
            joint, facts = positions[name].exact(prior)
            of_which = {"weights": name, "prior": prior}
            tables["posterior"].append(of_which | facts)
            tables["correlations"] += [of_which | row for row in correlation_rows(joint, positions[name].depth)]
            tables["divergences"] += [of_which | row for row in divergence_rows(joint)]
    return tables


def layer_correlations(joint: JointGaussian) -> dict[str, Tensor]:
    """The layer's name -> (r, r) correlations within it."""
    correlation = joint.correlation()
    return {name: correlation[rows, rows] for name, rows in joint.blocks()}


def shown(positions: Mapping[str, Position]) -> Sequence[tuple[str, JointGaussian, dict[str, int]]]:
    """The posteriors that pictures show: the run's name, the exact posterior, depths."""
    return [(name, positions[name].exact(priors[0])[0], positions[name].depth) for name, priors in PRIORS.items()]
