"""How well each score tells questions out of a classifier's scope from those in it, by one pass: CLINC150.

    python benchmarks/out_of_scope.py --data CLINC150 [--rows 3000 --steps 700] [--seeds 0 1 2]

CLINC150 is a directory of train.jsonl, validation.jsonl, test.jsonl ({"text", "label"}, 150 labels) and
out_of_scope.jsonl (1,000 questions of none of them), from clinc/oos-eval (Larson et al. 2019, CC BY 3.0). A run is
trained on rows in scope alone, and judged on all test rows against all rows out of scope, which nothing was chosen on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness

from scalabl.data.load import rows_of, shifted_rows
from scalabl.inference.evaluation import evaluate_run
from scalabl.inference.report.table import table
from scalabl.inference.settings import PredictionSettings
from scalabl.runs.settings import Settings
from scalabl.training.run import train

SCORES = ("probability", "entropy", "energy", "distance")
CHOICE = (
    "The features, the last layer's mean over tokens, were chosen among several layers, the first token, and what the "
    "head is given, on one run of seed 0 with these rows and with questions of Banking77 and TREC in view: the figure "
    "of the distance is a little optimistic."
)
FIGURES = ("auroc", "aupr", "fpr95")
SPLITS = ("train", "validation", "test")


def in_scope(data: Path, work: Path) -> Path:
    """A directory of the splits in scope alone, as a training reads it."""
    place = work / "in_scope"
    place.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        (place / f"{split}.jsonl").write_bytes((data / f"{split}.jsonl").read_bytes())
    return place


def measured(data: Path, work: Path, seed: int, a: Any) -> dict[str, Any]:
    """One run, trained or found finished, and its figures by one pass at the posterior mean."""
    task = in_scope(data, work)
    settings = Settings.flat(
        model=a.model, data=str(task), steps=a.steps, batch_size=a.batch_size, layers=a.layers, r=a.rank,
        learning_rate=a.learning_rate, prior_mean=a.prior_mean, prior_std=1.0, init_sigma=0.05, train_rows=a.rows,
        validation_rows=a.validation_rows, seed=seed,
    )  # fmt: skip
    run = work / f"seed_{seed}"
    record = train(settings, run)
    rows = rows_of(str(task), split="test", labels=record.labels)
    other = {"out of scope": shifted_rows(str(data / "out_of_scope.jsonl"), labels=record.labels)}
    report = evaluate_run(run, rows, other, [], PredictionSettings("mean"), data="CLINC150", batch_size=32)
    row = table(report, bootstrap=a.bootstrap)[0]
    found = row["ood"]["out of scope"]
    return {
        "seed": seed, "rows": record.rows["train"], "accuracy": row["accuracy"]["value"],
        "in_scope": row["n"], "out_of_scope": found["n"], "scores": {s: found["scores"][s] for s in SCORES},
    }  # fmt: skip


def page(runs: list[dict[str, Any]], facts: dict[str, str]) -> str:
    """The table, means over seeds where there are several, and the interval over rows where there is one."""
    rows = []
    for score in SCORES:
        cells = [score]
        for figure in FIGURES:
            values = [run["scores"][score][figure] for run in runs]
            mean = sum(value["value"] for value in values) / len(values)
            ends = f" ({values[0]['low']:.3f} to {values[0]['high']:.3f})" if len(values) == 1 else ""
            cells.append(f"{mean:.3f}{ends}")
        rows.append(cells)
    accuracy = sum(run["accuracy"] for run in runs) / len(runs)
    return "\n".join(
        [
            "# Out of scope",
            "",
            harness.markdown_table(["score", "AUROC ↑", "AUPR ↑", "FPR95 ↓"], rows),
            "",
            f"{runs[0]['in_scope']:,} test rows in scope (accuracy {accuracy:.1%}) against {runs[0]['out_of_scope']:,} "
            "out of scope, which are what is to be found. Every score is of one pass at the posterior mean. In "
            "brackets: 95 % bootstrap intervals over rows. FPR95: share of rows in scope that is flagged where 95 % of "
            "the others are found.",
            "",
            CHOICE,
            "",
            harness.markdown_facts(facts),
        ]
    )


def command(parser: Any, a: Any) -> str:
    """The command without places, and without what is at its default."""
    given = {k: v for k, v in vars(a).items() if k not in ("data", "work", "output") and v != parser.get_default(k)}
    words = [f"--{k.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in given.items()]
    return " ".join(["python benchmarks/out_of_scope.py --data CLINC150", *words])


def main() -> None:
    parser = harness.options(
        __doc__, data=(str, "The directory of CLINC150."), model="minilm-l6", rows=(3000, "Training rows."),
        validation_rows=1500, steps=700, batch_size=32, layers="last:3", rank=8, learning_rate=2e-3, prior_mean=0.577,
        seeds=[0], bootstrap=1000, work="runs/out_of_scope", output=str(harness.RESULTS),
    )  # fmt: skip
    a = parser.parse_args()
    data, work = Path(a.data).resolve(), Path(a.work) / f"{a.rows}_{a.steps}"
    runs = [measured(data, work, seed, a) for seed in a.seeds]
    facts = harness.facts(
        model=a.model,
        data=f"CLINC150, {runs[0]['rows']:,} training rows of 150 labels, {a.validation_rows:,} validation rows",
        training=f"{a.steps} steps of {a.batch_size}, r = {a.rank}, all linear modules of the layers {a.layers}, "
        f"learning rate {a.learning_rate:g}, prior mean {a.prior_mean:g}",
        seeds=", ".join(map(str, a.seeds)),
    )
    facts["command"] = command(parser, a)
    harness.write_results(Path(a.output), "out_of_scope", {"facts": facts, "runs": runs}, page(runs, facts))


if __name__ == "__main__":
    main()
