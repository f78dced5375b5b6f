"""ScalaBL trained in two ways by the same recipe, and what each does to the posterior and to held-out rows.

    python benchmarks/posteriors.py unit_rows --seeds 0 1 [--steps 150]
    python benchmarks/posteriors.py kl_normalization --seeds 0 1 2 [--data nq-open] [--steps 60] [--rows 100]

unit_rows: how the scale that A, B and s share is best kept: rows of A at unit length, or free as in the paper, at the
demo's budget. kl_normalization: the KL of a language model divided by trained tokens, or by rows. Each is written as
docs/results/NAME.{json,md}; a run that is finished is not trained again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from statistics import mean as average_of
from typing import Any

import torch
from harness import RESULTS, ROOT, facts, markdown_facts, markdown_table, options, write_results
from torch import Tensor

from scalabl.core.console import progress_bar, quiet
from scalabl.core.errors import UserError
from scalabl.data import TextTask, load_task, load_training_task
from scalabl.data.assemble import select_rows
from scalabl.inference.predictor import labels_of, log_probabilities
from scalabl.metrics import evaluate
from scalabl.metrics.uncertainty import average
from scalabl.predictive import MonteCarloPredictive
from scalabl.predictive.auto import make_predictive
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.settings import KL_NORMALIZATIONS, Settings
from scalabl.scoring.text import EncodedText
from scalabl.study.demos import DEMOS, LANGUAGE, demo_settings
from scalabl.training.run import train
from scalabl.tuner import mean, prior_of, stochastic_layers
from scalabl.tuner.diagnostics import summarize, weights_of

SAMPLES = 10
BATCH = 4
TITLES = {
    "unit_rows": "# How the scale of A is held",
    "kl_normalization": """# The KL of a language model: divided by tokens or by rows

The loss is the mean over trained tokens in both. Divided by trained tokens the objective is the exact ELBO \
(`kl_normalization: token`, the default); divided by rows the KL weighs as many times more as a row has trained tokens \
(`sequence`), as if a whole row were one observation.""",
}


def with_unit_rows(a: argparse.Namespace, unit_rows: bool, seed: int) -> dict[str, Any]:
    """Train one run (or take it from `runs`) and measure it on validation rows."""
    settings = demo_settings(LANGUAGE, "scalabl", seed=seed, steps=a.steps).changed(unit_rows=unit_rows)
    # the demo's own run where it is the same recipe
    directory = (
        a.runs / ("demo-seeds" if unit_rows else "free-rows") / f"seed{seed}" / f"scalabl-seed{seed}-steps{a.steps}"
    )
    train(settings, directory)
    run = load_run(directory)
    rows = select_rows(load_task(LANGUAGE), settings.rows).validation
    model = run.scorer.model
    layers = summarize(weights_of(model), prior_of(model))
    row: dict[str, Any] = {"rows of A": "unit length" if unit_rows else "free (paper)", "seed": seed}
    for name in ("mean", "mc"):
        probs = average(log_probabilities(run, rows, make_predictive(name, seed=seed), description=name))
        figures = evaluate(probs, labels_of(rows), bootstrap=2)
        row |= {f"nll, {name}": figures["nll"].value, f"ece, {name}": figures["ece"].value}
    lengths = [leaf.direction.detach().norm(dim=1).mean().item() for leaf in stochastic_layers(model).values()]
    return row | {
        "kl": sum(layer.kl for layer in layers),
        "mean of s": average_of(layer.mean for layer in layers),
        "sigma": average_of(layer.sigma for layer in layers),
        "sigma / mean": average_of(layer.noise for layer in layers),
        "length of stored rows": average_of(lengths),
    }


def with_normalization(a: argparse.Namespace, normalization: str, seed: int) -> dict[str, Any]:
    """Train one run (or take it from `runs`) and measure it on validation rows."""
    # few steps: Adam moves log sigma by the sum of its rates at most, and sigma has to arrive
    settings = Settings.flat(
        model=a.model, data=a.data, steps=a.steps, seed=seed, kl_normalization=normalization, layers="last:6",
        variational_learning_rate=0.1, prior_mean=0.0, prior_std=1.0, init_sigma=0.05, max_length=128,
        validation_rows=a.rows,
    )  # fmt: skip
    directory = a.runs / "kl-normalization" / f"{normalization}-seed{seed}-steps{a.steps}"
    record = train(settings, directory)
    run = load_run(directory, generating=True)
    task = load_training_task(settings.data)
    if not isinstance(task, TextTask):
        raise UserError(f"{settings.data} has no rows of text; give prompts with completions or open questions.")
    text: Any = run.scoring
    rows = [text.encode(row) for row in select_rows(task, settings.rows).validation]
    layers = summarize(weights_of(run.model), prior_of(run.model))
    of_mean, of_particles = log_likelihoods(run, rows, seed)
    tokens = sum(row.trained for row in rows)
    averaged = of_particles.logsumexp(dim=0) - math.log(SAMPLES)
    counted = record.tokens["trained"] if normalization == "token" else record.rows["train"]
    return {
        "KL divided by": f"{counted:,} {'trained tokens' if normalization == 'token' else 'rows'}",
        "seed": seed,
        "sigma": average_of(layer.sigma for layer in layers),
        "mean of s": average_of(layer.mean for layer in layers),
        "sigma / mean": average_of(layer.noise for layer in layers),
        "KL (nats)": sum(layer.kl for layer in layers),
        "nll a token, mean": -of_mean.sum().item() / tokens,
        f"nll a token, N = {SAMPLES}": -averaged.sum().item() / tokens,
        "spread over particles (nats a row)": of_particles.std(dim=0).mean().item(),
    }


@torch.no_grad()
def log_likelihoods(run: Run, rows: Sequence[EncodedText], seed: int) -> tuple[Tensor, Tensor]:
    """Summed log-likelihood of each row's trained tokens, in nats: under the mean (n,) and under particles (N, n)."""
    scorer, particles = run.scorer, MonteCarloPredictive(SAMPLES, seed=seed)
    of_mean, of_particles = [], []
    with progress_bar() as progress:
        bar = progress.add_task("held-out rows", total=len(rows), detail="")
        for start in range(0, len(rows), BATCH):
            batch = scorer.with_trunk(run.scoring.collate(rows[start : start + BATCH]).to(scorer.device))
            with mean(run.model):
                of_mean.append(scorer.class_logits(batch)[:, 0].cpu())
            with particles.context(run.model, 0, SAMPLES):
                of_particles.append(scorer.class_logits(batch.repeat(SAMPLES)).view(SAMPLES, -1).cpu())
            progress.advance(bar, len(batch))
    return torch.cat(of_mean), torch.cat(of_particles, dim=1)


def page(name: str, rows: Sequence[dict[str, Any]], known: dict[str, str]) -> str:
    """The results page."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return f"{TITLES[name]}\n\n{markdown_table(list(rows[0]), cells)}\n\n{markdown_facts(known)}"


def main() -> None:
    parser = options(
        __doc__,
        model=Settings().model,
        data="nq-open",
        steps=(0, "optimiser steps; 150, or 60 for kl_normalization, if left out"),
        seeds=[0],
        rows=(100, "held-out rows of kl_normalization"),
        runs=ROOT / "runs",
        results=RESULTS,
    )
    parser.add_argument("name", choices=TITLES)
    a = parser.parse_args()
    quiet()
    seeds = ",".join(map(str, a.seeds))
    if a.name == "unit_rows":
        a.steps = a.steps or DEMOS[LANGUAGE].steps
        rows = [with_unit_rows(a, unit, seed) for seed in a.seeds for unit in (True, False)]
        settings = demo_settings(LANGUAGE, "scalabl", seed=0, steps=a.steps)
        own = settings.rows
        data = f"{LANGUAGE}: {own.train_rows} training rows, {own.validation_rows} validation rows (measured on)"
        known = facts(model=settings.model, data=data, seeds=seeds)
    else:
        a.steps = a.steps or 60
        rows = [with_normalization(a, way, seed) for seed in a.seeds for way in KL_NORMALIZATIONS]
        data = f"{a.data}, {a.rows} validation rows measured on"
        known = facts(model=a.model, data=data, seeds=seeds, steps=str(a.steps))
    write_results(a.results, a.name, {"facts": known, "rows": rows}, page(a.name, rows, known))


if __name__ == "__main__":
    main()
