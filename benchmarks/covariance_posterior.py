"""The covariance study's runs and rows, what was computed of them before, and the exact Gauss-Newton posterior of s at
a run's weights: how far it is from having no correlations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from harness import digest
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.files import writing
from scalabl.data import Example, load_task
from scalabl.data.assemble import select_rows
from scalabl.data.load import rows_of, with_labels
from scalabl.posterior import FullGaussian
from scalabl.posterior.joint import JointGaussian
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import Settings
from scalabl.scoring import Encoded
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.training.posthoc.laplace import JointCurvature, gauss_newton, posterior_of, used_components
from scalabl.training.posthoc.svd import Factors, StochasticLeaves, factors_of
from scalabl.tuner import prior_of, stochastic_layers
from scalabl.tuner.layers import depths

RUNS = {"mle": "plain LoRA", "diagonal": "ScalaBL, diagonal", "full": "ScalaBL, full"}
Made = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and what JSON holds


@dataclass(frozen=True, eq=False)
class Study:
    """Attributes:
    directories: of the finished runs "mle", "diagonal" and "full".
    records: what their `scalabl.json` say.
    train: training rows that curvature and gradients are taken over, the first of them for the latter.
    test, shifted: rows to predict; of the runs' own task, and of another one.
    options: of the command line.
    """

    directories: dict[str, Path]
    records: dict[str, RunRecord]
    train: list[Example]
    test: list[Example]
    shifted: list[Example]
    options: argparse.Namespace

    def settings(self, name: str) -> Settings:
        return self.records[name].settings

    def run(self, name: str) -> Run:
        """The loaded run; one is in memory at a time."""
        return loaded(self.directories[name], self.options.model)

    def encoded(self, run: Run, rows: Sequence[Example]) -> list[Encoded]:
        """Rows as tokens with the frozen layers' output."""
        return with_stored_trunk(run.scorer, run.encode(list(rows)), batch_size=self.options.batch_size)

    def kept(self, name: str, made_from: Sequence[Any], make: Callable[[], Made]) -> Made:
        """What `make` gives, computed once for what it is made from."""
        path: Path = self.options.work / f"{name}-{digest(list(made_from))}.safetensors"
        if not path.is_file():
            tensors, facts = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
            with writing(path) as unfinished:
                save_file(contiguous, unfinished, metadata={"facts": json.dumps(facts)})
        # read back even where it was just made: a second start works on the very same numbers
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["facts"])

    def identity(self, name: str, *rows: Sequence[Example]) -> list[Any]:
        """A run and rows, for `kept`."""
        return [self.records[name].adapter_sha256, [[[r.question, r.choices, r.answer] for r in x] for x in rows]]


@lru_cache(maxsize=1)
def loaded(directory: Path, model: str | None) -> Run:
    """A finished run; the last one stays in memory."""
    return load_run(directory, model=model)


def study_of(options: argparse.Namespace) -> Study:
    """The study that the options ask for, checked before anything is loaded.

    Raises:
        UserError: a run is not finished, of another kind than its place, or of another task or base model.
    """
    directories = {name: getattr(options, name) for name in RUNS}
    records = {name: RunRecord.read_finished(directory) for name, directory in directories.items()}
    recipes = {name: record.recipe for name, record in records.items()}
    if recipes["mle"]["method"] not in ("mle", "map"):
        raise UserError(f"{options.mle} was trained by {recipes['mle']['method']}; give a run of plain LoRA as --mle.")
    for name in ("diagonal", "full"):
        recipe = recipes[name]
        if recipe["method"] != "scalabl" or recipe["covariance"] != name or records[name].joint_sha256:
            raise UserError(f"{directories[name]} is no run of scalabl train with covariance: {name}.")
        for setting in ("model", "data"):
            if recipe[setting] != recipes["mle"][setting]:
                raise UserError(
                    f"{directories[name]} has {setting} {recipe[setting]!r} and {options.mle} has "
                    f"{recipes['mle'][setting]!r}; the three runs must share it."
                )
    data, labels = recipes["mle"]["data"], records["mle"].labels
    settings = records["mle"].settings
    limit = min(options.train_rows, records["mle"].rows["train"])
    train = with_labels(select_rows(load_task(data), settings.changed(train_rows=limit).rows).train, labels, data)
    return Study(
        directories,
        records,
        train,
        rows_of(data, limit=options.test_rows, labels=labels),
        rows_of(options.ood, limit=options.ood_rows),
        options,
    )


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
                s / s_mu, which is what `scalabl bayesianize` takes without held-out rows. Correlations and divergences
                are the same in s and in relative strengths.

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
        study.settings(name).posterior.beta,
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
            tensors["learnt"] = torch.block_diag(*own).float().cpu()
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


def correlation_of(joint: JointGaussian) -> Tensor:
    """(D, D), float64, with 1 on the diagonal."""
    root = torch.nn.functional.normalize(joint.factor.double(), dim=1)
    return (root @ root.T).clamp(-1, 1).fill_diagonal_(1)


def correlation_rows(joint: JointGaussian, depth: Mapping[str, int]) -> list[dict[str, Any]]:
    """The sizes of the correlations by kind of pair; kinds without a pair are left out."""
    size, found = correlation_of(joint).abs(), []
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
    correlation = correlation_of(joint)
    return {name: correlation[rows, rows] for name, rows in joint.blocks()}


def off_diagonals(correlation: Tensor) -> Tensor:
    """(r, r) -> (r (r - 1) / 2,) the correlations of each pair, once."""
    rows, columns = torch.tril_indices(len(correlation), len(correlation), offset=-1)
    return correlation[rows, columns]


def shown(positions: Mapping[str, Position]) -> Sequence[tuple[str, JointGaussian, dict[str, int]]]:
    """The posteriors that pictures show: the run's name, the exact posterior, depths."""
    return [(name, positions[name].exact(priors[0])[0], positions[name].depth) for name, priors in PRIORS.items()]
