"""Active learning: do rows labelled by BALD or by entropy teach more than rows labelled at random?

    python benchmarks/active_learning.py

Every seed starts with the same rows for every strategy. A round ranks what is left of the pool by the last model, adds
the k chosen rows, and trains again from scratch by the same recipe and seed. Resumable cell by cell: a cell is a
directory named after all settings, and results are written after each. Needs the development environment (make dev).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import RESULTS, ROOT, facts, write_text
from active_learning_results import write

from scalabl.core.quiet import quiet
from scalabl.data import Example, load_task
from scalabl.data.assemble import shuffled
from scalabl.data.example import LETTERS
from scalabl.data.load import rows_of
from scalabl.inference.acquisition import STRATEGIES, informativeness, most_informative, random_order
from scalabl.inference.evaluation import answers, log_probabilities
from scalabl.metrics import evaluate
from scalabl.metrics.uncertainty import average
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.settings import Settings
from scalabl.training.run import train

START = "start"
VALIDATION_ROWS = 4  # a run has to have some; the recipe leaves nothing to choose by them
METRICS = ("accuracy", "nll", "ece")


@dataclass(frozen=True)
class Study:
    """What is the same in every cell.

    Attributes:
        recipe: of every training run, but for its data and seed.
        pool: the rows that may be labelled.
        validation, test: the other rows.
        start, k, rounds: rows labelled at first, a round, and how many rounds.
        samples: N of the predictive.
        strategies: of `scalabl.inference.acquisition`.
        seeds: each starts with other rows.
    """

    recipe: Settings
    pool: list[Example]
    validation: list[Example]
    test: list[Example]
    start: int
    k: int
    rounds: int
    samples: int
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]

    def digest(self) -> str:
        """Names everything that decides a cell but its seed, its strategy and its round."""
        rows = [[[r.question, r.choices, r.answer] for r in part] for part in (self.pool, self.validation, self.test)]
        content = [self.recipe.as_dict(), rows, self.start, self.k, self.samples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def study_of(a: argparse.Namespace) -> Study:
    """The study that the options ask for; rows are taken the same way every time.

    Raises:
        SystemExit: the pool has fewer rows than all rounds label.
    """
    rows = shuffled(load_task(a.data).split("train"), seed=0)
    validation, pool = rows[:VALIDATION_ROWS], rows[VALIDATION_ROWS : VALIDATION_ROWS + a.pool]
    if a.start + a.rounds * a.k > len(pool):
        raise SystemExit(f"the pool has {len(pool)} rows and {a.start} + {a.rounds} x {a.k} are to be labelled")
    recipe = Settings.flat(
        model=a.model,
        data=a.data,
        steps=a.steps,
        layers=a.layers,
        target_modules="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        variational_learning_rate=5e-2,
        schedule="warmup",
        kl_warmup=0.5,
        scoring="continuation",
        normalization="token",
        max_length=256,
    )
    test = rows_of(a.data, split="test", limit=a.test_rows)
    return Study(
        recipe, pool, validation, test, a.start, a.k, a.rounds, a.samples, tuple(a.strategies), tuple(a.seeds)
    )  # fmt: skip


def cells(study: Study, runs: Path) -> Iterator[dict[str, Any]]:
    """Every cell: {seed, by, round, labelled, picked, accuracy, nll, ece}, done now or known from before.

    `labelled` and `picked` are places in the pool: what was trained on, and strategy -> what comes next.
    """
    for seed in study.seeds:
        first = most_informative(random_order(len(study.pool), 1000 * seed), study.start)
        start = cell(study, runs, seed, START, 0, first, study.strategies if study.rounds else ())
        yield start
        for by in study.strategies:
            last = start
            for number in range(1, study.rounds + 1):
                labelled = last["labelled"] + last["picked"][by]
                last = cell(study, runs, seed, by, number, labelled, (by,) if number < study.rounds else ())
                yield last


def cell(
    study: Study, runs: Path, seed: int, by: str, number: int, labelled: list[int], strategies: Sequence[str]
) -> dict[str, Any]:
    """Train on the labelled rows, test, and pick the rows that each of the strategies wants next."""
    directory = runs / study.digest() / f"seed{seed}-{by}-{number}"
    kept = directory / "figures.json"
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if known["labelled"] == labelled and known["picked"].keys() >= set(strategies):
            print(f"{directory.name}: known", flush=True)
            return known
    _write_rows(directory / "rows" / "train.jsonl", [study.pool[i] for i in labelled])
    _write_rows(directory / "rows" / "validation.jsonl", study.validation)
    recipe = study.recipe.changed(data=str(directory / "rows"), seed=seed)
    train(recipe, directory / "run")
    run = load_run(directory / "run")
    predictive = run.predictive(samples=study.samples, seed=seed)
    log_probs = log_probabilities(run, study.test, predictive, description=directory.name)
    figures = evaluate(average(log_probs), answers(study.test), bootstrap=2)
    made = {"seed": seed, "by": by, "round": number, "labelled": labelled}
    made |= {metric: figures[metric].value for metric in METRICS}
    made["picked"] = picks(study, run, seed, number, labelled, strategies)
    write_text(kept, json.dumps(made) + "\n")
    print(f"{directory.name}: {len(labelled)} rows, ACC {made['accuracy']:.3f}, NLL {made['nll']:.3f}", flush=True)
    return made


def picks(
    study: Study, run: Run, seed: int, number: int, labelled: list[int], strategies: Sequence[str]
) -> dict[str, list[int]]:
    """Strategy -> the k places in the pool, none of them labelled, that it wants next."""
    known = set(labelled)
    left = [i for i in range(len(study.pool)) if i not in known]
    chosen: dict[str, list[int]] = {}
    if set(strategies) - {"random"}:
        predictive = run.predictive(samples=study.samples, seed=seed)
        # the whole pool every time: its frozen layers are then computed once for all cells
        log_probs = log_probabilities(run, study.pool, predictive, description="ranking the pool")
    for by in strategies:
        if by == "random":
            scores = random_order(len(study.pool), 1000 * seed + number + 1)
        else:
            scores = informativeness(log_probs, by)
        chosen[by] = [left[i] for i in most_informative(scores[left], study.k)]
    return chosen


def _write_rows(path: Path, rows: Sequence[Example]) -> None:
    """Labelled rows as JSONL; the answer is its text, or its index where the text might be a letter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        assert row.answer is not None
        text = row.choices[row.answer]
        answer = row.answer if text in LETTERS else text
        lines.append({"id": row.id, "question": row.question, "choices": row.choices, "answer": answer})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    """Do what is missing, and write active_learning.csv, .md and .svg after every cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--start", type=int, default=40, help="rows labelled at first")
    parser.add_argument("-k", type=int, default=40, help="rows labelled a round")
    parser.add_argument("--pool", type=int, default=240, help="rows that may be labelled")
    parser.add_argument("--test-rows", type=int, default=150)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", default="last:2")
    parser.add_argument("--samples", type=int, default=4, help="particles")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="arc-easy")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "active-learning", help="where the cells go")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    a = parser.parse_args()
    quiet()
    study = study_of(a)
    fit = study.recipe.optimisation
    known = facts(
        model=a.model,
        data=f"{a.data}: a pool of {len(study.pool)} training rows, {len(study.test)} test rows",
        method=f"ScalaBL, {fit.steps} steps of {fit.batch_size} rows, AdamW "
        f"{fit.learning_rate:g}, adapters of r = {study.recipe.adapter.r} on {a.layers}, N = {a.samples}",
        seeds=", ".join(map(str, a.seeds)),
    )
    done: list[dict[str, Any]] = []
    for made in cells(study, a.runs):
        done.append(made)
        write(done, known, a.output)


if __name__ == "__main__":
    main()
