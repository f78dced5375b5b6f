"""Why does a full covariance of s not help? The exact posterior's correlations, and what became of the learnt ones.

    python benchmarks/covariance.py --mle DIR --full DIR --diagonal DIR --ood arc-challenge

Three finished runs of one task: plain LoRA, and ScalaBL with a full and with a diagonal covariance. Four parts: how far
the exact joint posterior is from diagonal; what dropping its correlations does to predictions; what the full run's
covariance learnt of it; and how noisy its gradient is. Writes docs/results/covariance/*.csv, *.svg and README.md after
each part. What was computed is kept in --work, so that a second start goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import covariance_pictures as pictures
from _common import RESULTS, ROOT, facts, write_text
from covariance_learnt import fit_rows, learnt_rows
from covariance_noise import noise_rows
from covariance_posterior import PRIORS, position, posterior_tables
from covariance_predictions import prediction_rows, predictions
from covariance_results import as_csv, page
from covariance_study import RUNS, Study, study_of

from scalabl.core.errors import UserError
from scalabl.core.quiet import quiet

MC_ROWS, MC_OOD_ROWS = 24, 12  # 64 draws under 5 covariances are 320 passes over each row
# facts of the page that are numbers of the command line
SIZES = (
    "test_rows", "ood_rows", "mc_rows", "mc_ood_rows", "samples", "points", "draws", "batches", "noise_batch",
    "start_steps",
)  # fmt: skip


def options() -> argparse.Namespace:
    """The command line; what cannot be is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in RUNS.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"a finished run: {what}")
    parser.add_argument("--ood", required=True, help="rows of another task, by a benchmark's name or a JSONL file")
    parser.add_argument("--train-rows", type=int, default=400, help="training rows for curvature and gradients")
    parser.add_argument("--test-rows", type=int, default=200)
    parser.add_argument("--ood-rows", type=int, default=100)
    parser.add_argument("--points", type=int, default=128, help="of the linearised predictive's integral")
    parser.add_argument("--samples", type=int, default=64, help="draws of Monte Carlo; 0 leaves it out")
    parser.add_argument("--mc-rows", type=int, default=MC_ROWS, help="test rows of Monte Carlo, the first ones")
    parser.add_argument("--mc-ood-rows", type=int, default=MC_OOD_ROWS, help="rows of the other task for it")
    parser.add_argument("--draws", type=int, default=64, help="of each row's gradient")
    parser.add_argument("--batches", type=int, default=2, help="fixed batches of the gradient's noise")
    parser.add_argument("--noise-batch", type=int, default=8, help="rows of such a batch")
    parser.add_argument("--start-steps", type=int, default=20, help="of the short run that is the start")
    parser.add_argument("--null", type=int, default=2000, help="random signs and orders")
    parser.add_argument("--bootstrap", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time; the figures do not depend on it")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--model", help="the base model, if it has moved")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "covariance", help="where what is computed is kept"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "covariance", help="directory of the results")
    a = parser.parse_args()
    least = {"draws": 2, "noise_batch": 2, "samples": 0, "mc_rows": 0} | dict.fromkeys(("seed",), 0)
    for name, value in vars(a).items():
        if isinstance(value, int) and value < least.get(name, 1):
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least {least.get(name, 1)}")
    a.mc_rows, a.mc_ood_rows = min(a.mc_rows, a.test_rows), min(a.mc_ood_rows, a.ood_rows)
    return a


def main() -> None:
    """Do what is missing of the four parts, and write each as it is done."""
    a = options()
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
        drawn = {"correlations": pictures.correlations(positions), "sizes": pictures.sizes(positions)}
        self._done(posterior_tables(positions), drawn)

        found = predictions(study, positions["mle"])
        rows = prediction_rows(found, study.test, bootstrap=o.bootstrap, seed=o.seed)
        self._done({"predictions": rows}, {"predictions": pictures.predictions(rows)})

        learnt, nulls = learnt_rows(positions["full"], o.null, o.seed)
        drawn = {"learnt": pictures.learnt(positions["full"], nulls, learnt[-1]["conditional_cosine"])}
        self._done({"learnt": learnt, "fit": fit_rows(positions)}, drawn)

        noise, ratios = noise_rows(study)
        self._done({"gradient_noise": noise}, {"gradient_noise": pictures.gradient_noise(ratios, o.draws)})

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
        write_text(output / "README.md", page(self.tables, self._facts(), sizes))
        print(f"{output}: {', '.join(tables)}", flush=True)

    def _facts(self) -> dict[str, str]:
        study = self.study
        recipes = {name: study.recipe(name) for name in RUNS}
        first = recipes["mle"]
        of_runs = "; ".join(
            f"{RUNS[name]}: {r.optimisation.steps} steps of {r.optimisation.batch_size}, seed {r.seed}, "
            f"{study.records[name].rows['train']:,} rows"
            for name, r in recipes.items()
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
