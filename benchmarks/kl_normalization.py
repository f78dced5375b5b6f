"""What the KL's normalisation does to the posterior of a language model: divided by trained tokens, or by rows.

    python benchmarks/kl_normalization.py [--data nq-open] [--steps 60] [--seeds 0] [--rows 100] [--runs DIR]

Trains ScalaBL on rows of text both ways with the same recipe and looks at the posterior and at held-out rows: the
negative log-likelihood of a trained token under the mean and under the average over N = 10 particles, and how far the
particles' log-likelihoods of a row lie apart. Writes docs/results/kl_normalization.{json,md}.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS, facts, markdown_facts, markdown_table, write_results
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.progress import progress_bar
from scalabl.core.quiet import quiet
from scalabl.data import TextTask, load_training_task
from scalabl.generation.loading import LanguageRun, load_language_run
from scalabl.predictive import MonteCarloPredictive
from scalabl.runs.settings import KL_NORMALIZATIONS, Settings
from scalabl.scoring import Scorer
from scalabl.scoring.text import EncodedText
from scalabl.scoring.trunk import Trunk
from scalabl.training.run import select_rows, train
from scalabl.tuner import mean, prior_of
from scalabl.tuner.diagnostics import summarize, weights_of

SAMPLES = 10
BATCH = 4


def recipe_of(normalization: str, arguments: argparse.Namespace, seed: int) -> Settings:
    """Both ways the same, but for what the KL is divided by."""
    return Settings.flat(
        model=arguments.model,
        data=arguments.data,
        steps=arguments.steps,
        seed=seed,
        kl_normalization=normalization,
        layers="last:6",
        # few steps: Adam moves log sigma by the sum of its rates at most, and sigma has to arrive
        variational_learning_rate=0.1,
        max_length=128,
        validation_rows=arguments.rows,
    )


@torch.no_grad()
def log_likelihoods(run: LanguageRun, rows: Sequence[EncodedText], seed: int) -> tuple[Tensor, Tensor]:
    """Summed log-likelihood of each row's trained tokens, in nats: under the mean (n,) and under particles (N, n)."""
    scorer = Scorer(run.model, run.text, Trunk(run.model))
    particles = MonteCarloPredictive(SAMPLES, seed=seed)
    of_mean, of_particles = [], []
    with progress_bar() as progress:
        bar = progress.add_task("held-out rows", total=len(rows), detail="")
        for start in range(0, len(rows), BATCH):
            batch = scorer.with_trunk(run.text.collate(rows[start : start + BATCH]).to(scorer.device))
            with mean(run.model):
                of_mean.append(scorer.class_logits(batch)[:, 0].cpu())
            with particles.context(run.model, 0, SAMPLES):
                of_particles.append(scorer.class_logits(batch.repeat(SAMPLES)).view(SAMPLES, -1).cpu())
            progress.advance(bar, len(batch))
    return torch.cat(of_mean), torch.cat(of_particles, dim=1)


def measure(normalization: str, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one run (or take it from `runs`) and measure it."""
    recipe = recipe_of(normalization, arguments, seed)
    directory = arguments.runs / f"{normalization}-seed{seed}-steps{arguments.steps}"
    record = train(recipe, directory)
    run = load_language_run(directory)
    task = load_training_task(recipe.data)
    if not isinstance(task, TextTask):
        raise UserError(f"{recipe.data} has no rows of text; give prompts with completions or open questions.")
    held_out = select_rows(task, recipe.rows).validation
    rows = [run.text.encode(row) for row in held_out]
    layers = summarize(weights_of(run.model), prior_of(run.model))
    of_mean, of_particles = log_likelihoods(run, rows, seed)
    tokens = sum(row.trained for row in rows)
    average = of_particles.logsumexp(dim=0) - math.log(SAMPLES)
    counted = record.tokens["trained"] if normalization == "token" else record.rows["train"]
    return {
        "KL divided by": f"{counted:,} {'trained tokens' if normalization == 'token' else 'rows'}",
        "seed": seed,
        "sigma": statistics.mean(layer.sigma for layer in layers),
        "mean of s": statistics.mean(layer.mean for layer in layers),
        "sigma / mean": statistics.mean(layer.noise for layer in layers),
        "KL (nats)": sum(layer.kl for layer in layers),
        "nll a token, mean": -of_mean.sum().item() / tokens,
        f"nll a token, N = {SAMPLES}": -average.sum().item() / tokens,
        "spread over particles (nats a row)": of_particles.std(dim=0).mean().item(),
    }


def report(rows: Sequence[dict[str, Any]], known: dict[str, str]) -> str:
    """The results page."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return (
        "# The KL of a language model: divided by tokens or by rows\n\n"
        "The loss is the mean over trained tokens in both. Divided by trained tokens the objective is the exact ELBO "
        "(`kl_normalization: token`, the default); divided by rows the KL weighs as many times more as a row has "
        "trained tokens (`sequence`), as if a whole row were one observation.\n\n"
        f"{markdown_table(list(rows[0]), cells)}\n\n{markdown_facts(known)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=Settings().model)
    parser.add_argument("--data", default="nq-open")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/kl-normalization"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    quiet()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = [measure(name, arguments, seed) for seed in seeds for name in KL_NORMALIZATIONS]
    known = facts(
        model=arguments.model,
        data=f"{arguments.data}, {arguments.rows} validation rows measured on",
        seeds=arguments.seeds,
        steps=str(arguments.steps),
    )
    write_results(arguments.results, "kl_normalization", {"facts": known, "rows": rows}, report(rows, known))


if __name__ == "__main__":
    main()
