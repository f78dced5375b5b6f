"""Why does a full covariance of s not help? The exact posterior's correlations, and what became of the learnt ones.

    python benchmarks/covariance.py --mle DIR --full DIR --diagonal DIR --ood arc-challenge

Three finished runs of one task: plain LoRA, and ScalaBL with a full and with a diagonal covariance. Four parts: how far
the exact joint posterior is from diagonal; what dropping its correlations does to predictions; what the full run's
covariance learnt of it; and how noisy its gradient is. Writes docs/results/covariance/*.csv, *.svg and README.md after
each part. What was computed is kept in --work, so that a second start goes on where the first one stopped.

What was learnt: among Gaussians without correlations between layers the ELBO of a quadratic loss is highest at the
"conditional" blocks of the exact posterior, the inverses of the precision's own blocks; the learnt covariance is
compared with that.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import covariance_page as pages
import torch
from covariance_effects import noise_rows, prediction_rows, predictions
from covariance_posterior import (
    PRIORS,
    RUNS,
    Position,
    Study,
    layer_correlations,
    off_diagonals,
    position,
    posterior_tables,
    study_of,
)
from harness import RESULTS, ROOT, as_csv, facts, options
from torch import Tensor

from scalabl.core.console import quiet
from scalabl.core.errors import UserError
from scalabl.core.files import write_text
from scalabl.posterior.joint import JointGaussian

NULLS = ("signs", "order")
# facts of the page that are numbers of the command line
SIZES = (
    "test_rows", "ood_rows", "mc_rows", "mc_ood_rows", "samples", "points", "draws", "batches", "noise_batch",
    "start_steps",
)  # fmt: skip


def cosine(learnt: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Between the off-diagonals of correlation matrices, all layers behind each other; 0 where one has none."""
    a, b = (torch.cat([off_diagonals(x) for x in matrices]) for matrices in (learnt, exact))
    length = (a.norm() * b.norm()).item()
    return (a @ b).item() / length if length > 0 else 0.0


def null_cosines(learnt: Sequence[Tensor], exact: Sequence[Tensor], null: str, number: int, seed: int) -> Tensor:
    """(number,) cosines of learnt correlations that have nothing to do with the exact ones.

    Args:
        learnt: (r, r) correlation matrices, one a layer.
        exact: of the same layers.
        null: "signs" flips the sign of each number at random, so that correlations keep their sizes and lose their
            signs; "order" shuffles the numbers of each layer, so that they keep both and lose their places.
        number: how many.
        seed: of the flips and shuffles.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(number):
        other = []
        for matrix in learnt:
            if null == "signs":
                sign = torch.randint(2, (len(matrix),), generator=generator).to(matrix) * 2 - 1
                other.append(torch.outer(sign, sign) * matrix)
            else:
                order = torch.randperm(len(matrix), generator=generator)
                other.append(matrix[order][:, order])
        found.append(cosine(other, exact))
    return torch.tensor(found, dtype=torch.float64)


def p_value(observed: float, null: Tensor) -> float:
    """(1 + number of null values at least as large) / (1 + number of them) [Phipson and Smyth 2010]."""
    # the observed arrangement is one of the null's, and rounding must not take it out
    return (1 + int((null >= observed - 1e-12).sum())) / (1 + len(null))


def learnt_rows(at: Position, number: int, seed: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Each layer's row and one of all together, and the null cosines of all together by name.

    rms_*: root mean square correlation; *_cosine: with the learnt ones; slope: of the learnt on the conditional ones,
    1 where they agree; rest_rms: what the slope leaves; p_*: of the cosine with the conditional ones.
    """
    exact, _ = at.exact("own")
    learnt = layer_correlations(at.learnt_relative())
    conditional = layer_correlations(exact.restricted("layer", "conditional"))
    marginal = layer_correlations(exact)
    groups: dict[str, list[str]] = {name: [name] for name in learnt if len(learnt[name]) > 1}
    rows, nulls = [], {}
    for layer, members in (groups | {"all": list(learnt)}).items():
        own, best, block = ([of[name] for name in members] for of in (learnt, conditional, marginal))
        a, b, c = (torch.cat([off_diagonals(x) for x in matrices]) for matrices in (own, best, block))
        found = cosine(own, best)
        nulls = {null: null_cosines(own, best, null, number, seed) for null in NULLS}
        slope = (a @ b / (b @ b)).item() if b.any() else 0.0
        rows.append(
            {
                "layer": layer,
                "pairs": len(a),
                "rms_learnt": _rms(a),
                "rms_conditional": _rms(b),
                "rms_marginal": _rms(c),
                "conditional_cosine": found,
                "marginal_cosine": cosine(own, block),
                "slope": slope,
                "rest_rms": _rms(a - slope * b),
                **{f"p_{null}": p_value(found, values) for null, values in nulls.items()},
            }
        )
    return rows, nulls  # "all" stands last


def fit_rows(positions: Mapping[str, Position]) -> list[dict[str, Any]]:
    """KL(q || exact posterior) in nats of what the runs learnt and of the best that such a q can be.

    Up to a constant it is the ELBO of the quadratic loss around the run's mean, so that a difference of two is what the
    one gains over the other.
    """
    found = []
    for name in ("diagonal", "full"):
        at = positions[name]
        exact, _ = at.exact("own")
        of: dict[str, JointGaussian] = {"learnt": at.learnt_relative()}
        if name == "full":
            of["learnt, correlations dropped"] = at.learnt_relative(correlated=False)
        of["best full in each layer"] = exact.restricted("layer", "conditional")
        of["best diagonal"] = exact.restricted("diagonal", "conditional")
        for kind, q in of.items():
            kl = q.kl(exact)
            found.append({"weights": name, "q": kind, "kl": kl, "kl_a_row": kl / at.curvature.rows})
    return found


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item() if len(values) else 0.0


def parse() -> argparse.Namespace:
    """The command line; what cannot be is refused."""
    parser = options(
        __doc__,
        **{name: (Path, f"a finished run: {what}") for name, what in RUNS.items()},
        ood=(str, "rows of another task, by a benchmark's name or a JSONL file"),
        train_rows=(400, "training rows for curvature and gradients"),
        test_rows=200,
        ood_rows=100,
        points=(128, "of the linearised predictive's integral"),
        samples=(64, "draws of Monte Carlo; 0 leaves it out"),
        mc_rows=(24, "test rows of Monte Carlo, the first ones: 64 draws of 5 covariances are 320 passes of each"),
        mc_ood_rows=(12, "rows of the other task for it"),
        draws=(64, "of each row's gradient"),
        batches=(2, "fixed batches of the gradient's noise"),
        noise_batch=(8, "rows of such a batch"),
        start_steps=(20, "of the short run that is the start"),
        null=(2000, "random signs and orders"),
        bootstrap=1000,
        batch_size=(8, "rows at a time; the figures do not depend on it"),
        seed=(0, "of all draws"),
        model=(None, "the base model, if it has moved"),
        work=(ROOT / "runs" / "covariance", "where what is computed is kept"),
        output=(RESULTS / "covariance", "directory of the results"),
    )
    a = parser.parse_args()
    least = {"draws": 2, "noise_batch": 2, "samples": 0, "mc_rows": 0, "seed": 0}
    for name, value in vars(a).items():
        if isinstance(value, int) and value < least.get(name, 1):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least {least.get(name, 1)}")
    a.mc_rows, a.mc_ood_rows = min(a.mc_rows, a.test_rows), min(a.mc_ood_rows, a.ood_rows)
    return a


def main() -> None:
    """Do what is missing of the four parts, and write each as it is done."""
    a = parse()
    quiet()
    try:
        study = study_of(a)
        Report(study).write()
    except UserError as error:
        raise SystemExit(str(error)) from error


class Report:
    """The tables and pictures that are done, written after each part."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def write(self) -> None:
        """All four parts."""
        study, o = self.study, self.study.options
        positions = {name: position(study, name) for name in PRIORS}
        drawn = {"correlations": pages.picture_of_correlations(positions), "sizes": pages.picture_of_sizes(positions)}
        self._done(posterior_tables(positions), drawn)

        found = predictions(study, positions["mle"])
        rows = prediction_rows(found, study.test, bootstrap=o.bootstrap, seed=o.seed)
        self._done({"predictions": rows}, {"predictions": pages.picture_of_predictions(rows)})

        learnt, nulls = learnt_rows(positions["full"], o.null, o.seed)
        drawn = {"learnt": pages.picture_of_learnt(positions["full"], nulls, learnt[-1]["conditional_cosine"])}
        self._done({"learnt": learnt, "fit": fit_rows(positions)}, drawn)

        noise, ratios = noise_rows(study)
        self._done({"gradient_noise": noise}, {"gradient_noise": pages.picture_of_gradient_noise(ratios, o.draws)})

    def _done(self, tables: dict[str, list[dict[str, Any]]], drawn: dict[str, str]) -> None:
        output: Path = self.study.options.output
        output.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            write_text(output / f"{name}.csv", as_csv(rows))
        for name, picture in drawn.items():
            write_text(output / f"{name}.svg", picture)
        self.tables |= tables
        sizes = {name: f"{getattr(self.study.options, name):,}" for name in SIZES}
        sizes |= {"test_rows": f"{len(self.study.test):,}", "ood_rows": f"{len(self.study.shifted):,}"}
        write_text(output / "README.md", pages.page(self.tables, self._facts(), sizes))
        print(f"{output}: {', '.join(tables)}", flush=True)

    def _facts(self) -> dict[str, str]:
        study = self.study
        settings = {name: study.settings(name) for name in RUNS}
        first = settings["mle"]
        of_runs = "; ".join(
            f"{RUNS[name]}: {r.optimisation.steps} steps of {r.optimisation.batch_size}, seed {r.seed}, "
            f"{study.records[name].rows['train']:,} rows"
            for name, r in settings.items()
        )
        return facts(
            model=f"{first.model}, adapters of r = {first.adapter.r} on "
            f"{first.adapter.target_modules} of {first.adapter.layers} layers",
            data=f"{first.data}: {len(study.train):,} training rows, {len(study.test):,} test rows; "
            f"{study.options.ood}: {len(study.shifted):,} rows",
            runs=of_runs,
            seeds=f"{study.options.seed} for draws, flips, shuffles and resamples",
        )


if __name__ == "__main__":
    main()
