"""How the scale that A, B and s share is best held: rows of A at unit length, or free as in the paper.

    python benchmarks/unit_rows.py [--seeds 0,1] [--steps 150] [--runs DIR]

Trains ScalaBL both ways at the demo's budget and compares the held-out NLL of the mean and of N = 10, the KL, the
posterior, and how far the rows of A have moved from unit length. Writes docs/results/unit_rows.{json,md}.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from _common import RESULTS, facts, markdown_facts, markdown_table, write_results

from scalabl.core.quiet import quiet
from scalabl.data import load_task
from scalabl.inference.evaluation import answers, log_probabilities
from scalabl.metrics import evaluate
from scalabl.metrics.uncertainty import average
from scalabl.predictive.auto import make_predictive
from scalabl.runs.loading import load_run
from scalabl.study.demo import TASK, demo_recipe
from scalabl.training.run import select_rows, train
from scalabl.tuner import prior_of, stochastic_layers
from scalabl.tuner.diagnostics import summarize, weights_of


def measure(unit_rows: bool, seed: int, steps: int, runs: Path) -> dict[str, Any]:
    """Train one run (or take it from `runs`) and measure it on held-out rows."""
    recipe = dataclasses.replace(demo_recipe("scalabl", seed=seed, steps=steps), unit_rows=unit_rows)
    # the demo's own run where it is the same recipe; others beside it, not among it
    own = runs / f"seed{seed}" if unit_rows else runs.parent / "free-rows" / f"seed{seed}"
    directory = own / f"scalabl-seed{seed}-steps{steps}"
    train(recipe, directory)
    run = load_run(directory)
    rows = select_rows(load_task(TASK), recipe.rows).validation
    model = run.scorer.model
    layers = summarize(weights_of(model), prior_of(model))
    lengths = [leaf.direction.detach().norm(dim=1).mean().item() for leaf in stochastic_layers(model).values()]
    row: dict[str, Any] = {"rows of A": "unit length" if unit_rows else "free (paper)", "seed": seed}
    for name in ("mean", "mc"):
        probs = average(log_probabilities(run, rows, make_predictive(name, seed=seed), description=name))
        figures = evaluate(probs, answers(rows), bootstrap=2)
        row |= {f"nll, {name}": figures["nll"].value, f"ece, {name}": figures["ece"].value}
    return row | {
        "kl": sum(layer.kl for layer in layers),
        "mean of s": statistics.mean(layer.mean for layer in layers),
        "sigma": statistics.mean(layer.sigma for layer in layers),
        "sigma / mean": statistics.mean(layer.noise for layer in layers),
        "length of stored rows": statistics.mean(lengths),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"))
    arguments = parser.parse_args()
    quiet()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    rows = [measure(unit, seed, arguments.steps, arguments.runs) for seed in seeds for unit in (True, False)]
    recipe = demo_recipe("scalabl", seed=0, steps=arguments.steps)
    known = facts(
        model=recipe.model,
        data=f"{TASK}: {recipe.rows.train_rows} training rows, {recipe.rows.validation_rows} validation rows "
        "(measured on)",
        seeds=arguments.seeds,
    )
    names = list(rows[0])
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    text = f"# How the scale of A is held\n\n{markdown_table(names, cells)}\n\n{markdown_facts(known)}"
    write_results(RESULTS, "unit_rows", {"facts": known, "rows": rows}, text)


if __name__ == "__main__":
    main()
