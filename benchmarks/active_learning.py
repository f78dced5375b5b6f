r"""Active learning: do rows labelled by BALD or by entropy teach more than rows labelled at random?

    python benchmarks/active_learning.py
    python benchmarks/active_learning.py --name active_learning_heads --model minilm-l6 --data data/banking77 \
        --per-class 2 -k 77 --pool 1500 --test-rows 600 --steps 150 --layers last:3 --samples 5 \
        --seeds 0 1 2 3 4 5 6 7 --strategies bald entropy margin distance random

With --per-class the start has so many rows of each label, and a classification head is trained; without, rows are taken
at random and their choices scored by a language model.

Every seed starts with the same rows for every strategy. A round ranks what is left of the pool by the last model, adds
the k chosen rows, and trains again from scratch by the same recipe and seed. Resumable cell by cell: a cell is a
directory named after all settings, and results are written after each. Needs the development environment (make dev).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scalabl.core.console import quiet
from scalabl.core.files import write_text
from scalabl.data import Example, load_task
from scalabl.data.assemble import shuffled
from scalabl.data.example import LETTERS
from scalabl.data.load import rows_of, with_labels
from scalabl.inference.acquisition import STRATEGIES, informativeness, most_informative, random_order
from scalabl.inference.predictor import Predictor, labels_of, log_probabilities
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics import evaluate
from scalabl.metrics.uncertainty import average
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.settings import Settings
from scalabl.training.run import train

NAME = "active_learning"
START = "start"
VALIDATION_ROWS = 4  # a run has to have some; the recipe leaves nothing to choose by them
METRICS = ("accuracy", "nll", "ece")
COLUMNS = ("seed", "by", "round", "labelled", *METRICS)
OTHERS = ("distance",)  # to the labelled rows in the features of a head, beside what `scalabl acquire` knows
TITLES = {"bald": "BALD", "entropy": "total entropy", "margin": "margin", "distance": "distance", "random": "random"}
STYLE = {
    "bald": ("#0072b2", "solid"), "entropy": ("#d55e00", "dashed"), "margin": ("#009e73", "dashdot"),
    "distance": ("#cc79a7", (0, (1, 1))), "random": ("#555555", "dotted"),
}  # fmt: skip
HEADINGS = {"accuracy": "accuracy", "nll": "NLL (nats)"}

Curves = dict[str, dict[int, dict[int, dict[str, float]]]]  # strategy -> rows labelled -> seed -> metric -> value


@dataclass(frozen=True)
class Study:
    """What is the same in every cell.

    Attributes:
        settings: of every training run, but for its data and seed.
        pool: the rows that may be labelled.
        validation, test: the other rows.
        start, k, rounds: rows labelled at first, a round, and how many rounds.
        per_class: of each label at first, in the place of `start`, for a classification head; 0 for a language model.
        samples: N of the predictive.
        strategies: of `scalabl.inference.acquisition`, and `OTHERS`.
        seeds: each starts with other rows.
    """

    settings: Settings
    pool: list[Example]
    validation: list[Example]
    test: list[Example]
    start: int
    k: int
    rounds: int
    samples: int
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    per_class: int = 0

    def digest(self) -> str:
        """Names everything that decides a cell but its seed, its strategy and its round."""
        rows = [[[r.question, r.choices, r.answer] for r in part] for part in (self.pool, self.validation, self.test)]
        first = self.start if not self.per_class else {"per_class": self.per_class}
        return harness.digest([self.settings.as_dict(), rows, first, self.k, self.samples])

    def first(self, seed: int) -> list[int]:
        """Places in the pool that a seed starts with."""
        order = most_informative(random_order(len(self.pool), 1000 * seed), len(self.pool))
        if not self.per_class:
            return order[: self.start]
        taken: Counter[int | None] = Counter()
        found = []
        for place in order:
            label = self.pool[place].answer
            taken[label] += 1
            if taken[label] <= self.per_class:
                found.append(place)
        return found


def study_of(a: argparse.Namespace) -> Study:
    """The study that the options ask for; rows are taken the same way every time.

    Raises:
        SystemExit: the pool has fewer rows than all rounds label.
    """
    rows = shuffled(load_task(a.data).split("train"), seed=0)
    validation, pool = rows[:VALIDATION_ROWS], rows[VALIDATION_ROWS : VALIDATION_ROWS + a.pool]
    start = a.per_class * len(rows[0].choices) if a.per_class else a.start
    if start + a.rounds * a.k > len(pool):
        raise SystemExit(f"the pool has {len(pool)} rows and {start} + {a.rounds} x {a.k} are to be labelled")
    shared = {"model": a.model, "data": a.data, "steps": a.steps, "layers": a.layers}
    if a.per_class:
        # what the study's validation rows take for this encoder
        settings = Settings.flat(**shared, scoring="head", learning_rate=2e-3, batch_size=16, max_length=64)
    else:
        settings = Settings.flat(
            **shared,
            target_modules="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
            variational_learning_rate=5e-2,
            prior_mean=0.0,
            prior_std=1.0,
            init_sigma=0.05,
            schedule="warmup",
            kl_warmup=0.5,
            scoring="continuation",
            normalization="token",
            max_length=256,
        )
    test = rows_of(a.data, split="test", limit=a.test_rows)
    return Study(
        settings, pool, validation, test, start, a.k, a.rounds, a.samples, tuple(a.strategies), tuple(a.seeds),
        a.per_class,
    )  # fmt: skip


def cells(study: Study, runs: Path) -> Iterator[dict[str, Any]]:
    """Every cell: {seed, by, round, labelled, picked, accuracy, nll, ece}, done now or known from before.

    `labelled` and `picked` are places in the pool: what was trained on, and strategy -> what comes next.
    """
    for seed in study.seeds:
        start = cell(study, runs, seed, START, 0, study.first(seed), study.strategies if study.rounds else ())
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
    figures_file = directory / "figures.json"
    if figures_file.is_file():
        known: dict[str, Any] = json.loads(figures_file.read_text(encoding="utf-8"))
        if known["labelled"] == labelled and known["picked"].keys() >= set(strategies):
            print(f"{directory.name}: known", flush=True)
            return known
    _write_rows(directory / "rows" / "train.jsonl", [study.pool[i] for i in labelled], labels=study.per_class > 0)
    _write_rows(directory / "rows" / "validation.jsonl", study.validation, labels=study.per_class > 0)
    settings = study.settings.changed(data=str(directory / "rows"), seed=seed)
    train(settings, directory / "run")
    run = load_run(directory / "run")
    predictive, test = run.predictive(samples=study.samples, seed=seed), _rows(run, study.test)
    log_probs = log_probabilities(run, test, predictive, description=directory.name)
    figures = evaluate(average(log_probs), labels_of(test), bootstrap=2)
    made = {"seed": seed, "by": by, "round": number, "labelled": labelled}
    made |= {metric: figures[metric].value for metric in METRICS}
    made["picked"] = picks(study, run, seed, number, labelled, strategies)
    write_text(figures_file, json.dumps(made) + "\n")
    print(f"{directory.name}: {len(labelled)} rows, ACC {made['accuracy']:.3f}, NLL {made['nll']:.3f}", flush=True)
    return made


def picks(
    study: Study, run: Run, seed: int, number: int, labelled: list[int], strategies: Sequence[str]
) -> dict[str, list[int]]:
    """Strategy -> the k places in the pool, none of them labelled, that it wants next."""
    known = set(labelled)
    left = [i for i in range(len(study.pool)) if i not in known]
    chosen: dict[str, list[int]] = {}
    # the whole pool every time: its frozen layers are then computed once for all cells
    pool = _rows(run, study.pool)
    if set(strategies) - {"random", "distance"}:
        predictive = run.predictive(samples=study.samples, seed=seed)
        log_probs = log_probabilities(run, pool, predictive, description="ranking the pool")
    for by in strategies:
        if by == "random":
            scores = random_order(len(study.pool), 1000 * seed + number + 1)
        elif by == "distance":
            scores = Predictor(run, PredictionSettings("mean", raw=True)).mean_scores(pool)["distance"]
        else:
            scores = informativeness(log_probs, by)
        chosen[by] = [left[i] for i in most_informative(scores[left], study.k)]
    return chosen


def _rows(run: Run, rows: list[Example]) -> list[Example]:
    """Rows with the labels in the run's order."""
    return with_labels(rows, run.record.labels, "the pool") if run.record.labels else rows


def _write_rows(path: Path, rows: Sequence[Example], *, labels: bool = False) -> None:
    """Rows as JSONL: of a text and its label, or of choices, where the answer is its text, or its index where the text
    might be a letter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        assert row.answer is not None
        if labels:
            lines.append({"id": row.id, "text": row.question, "label": row.choices[row.answer]})
            continue
        text = row.choices[row.answer]
        answer = row.answer if text in LETTERS else text
        lines.append({"id": row.id, "question": row.question, "choices": row.choices, "answer": answer})
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def main() -> None:
    """Do what is missing, and write active_learning.csv, .md and .svg after every cell."""
    parser = harness.options(
        __doc__,
        seeds=[0, 1],
        strategies=(list(STRATEGIES), "of a head also distance", (*STRATEGIES, *OTHERS)),
        rounds=2,
        start=(40, "rows labelled at first"),
        per_class=(0, "rows of each label labelled at first, of a classification head"),
        k=(40, "rows labelled a round"),
        pool=(240, "rows that may be labelled"),
        test_rows=150,
        steps=60,
        layers="last:2",
        samples=(4, "particles"),
        model="smollm2-135m-instruct",
        data="arc-easy",
        runs=(harness.ROOT / "runs" / "active-learning", "where the cells go"),
        output=(harness.RESULTS, "directory of the results"),
        name=(NAME, "of the files there"),
    )
    a = parser.parse_args()
    quiet()
    study = study_of(a)
    fit = study.settings.optimisation
    known = harness.facts(
        model=a.model,
        data=f"{a.data}: a pool of {len(study.pool)} training rows, {len(study.test)} test rows",
        method=f"ScalaBL, {fit.steps} steps of {fit.batch_size} rows, AdamW {fit.learning_rate:g}, adapters of "
        f"r = {study.settings.adapter.r} on {a.layers}, N = {a.samples}",
        seeds=", ".join(map(str, a.seeds)),
    )
    done: list[dict[str, Any]] = []
    for made in cells(study, a.runs):
        done.append(made)
        found = curves(done)
        page = markdown(found, known, a.name)
        harness.write_results(a.output, a.name, None, page, csv_of(done), picture(found), show=False)


def csv_of(cells: Sequence[dict[str, Any]]) -> str:
    """One line a cell."""
    return harness.as_csv([cell | {"labelled": len(cell["labelled"])} for cell in cells], COLUMNS)


def curves(cells: Sequence[dict[str, Any]]) -> Curves:
    """The cells by strategy; the start of a seed belongs to every strategy."""
    strategies = [name for name in TITLES if any(cell["by"] == name for cell in cells)]
    found: Curves = {by: {} for by in strategies}
    for by in strategies:
        for cell in cells:
            if cell["by"] in (by, "start"):
                figures = {metric: cell[metric] for metric in METRICS}
                found[by].setdefault(len(cell["labelled"]), {})[cell["seed"]] = figures
    return found


def markdown(found: Curves, known: dict[str, str], name: str = NAME) -> str:
    """The results as a page."""
    rows: list[dict[str, Any]] = []
    for by, curve in found.items():
        for labelled in sorted(curve):
            first = labelled == min(curve)
            gaps = {m: None if first else _difference(found, by, labelled, m) for m in HEADINGS}
            rows.append({"by": TITLES[by], "labelled": labelled, "seeds": curve[labelled].values(), "gaps": gaps})
    shown = harness.table(
        rows,
        ("picked by", "{by}"),
        ("rows labelled", "{labelled}"),
        ("ACC % ↑", lambda row: _mean([100 * f["accuracy"] for f in row["seeds"]], 1)),
        ("NLL ↓", lambda row: _mean([f["nll"] for f in row["seeds"]], 3)),
        ("ACC − random", lambda row: _shown(row["gaps"]["accuracy"], 100, 1)),
        ("NLL − random", lambda row: _shown(row["gaps"]["nll"], 1, 3)),
    )
    parts = [
        "# Active learning: which rows to label",
        f"![learning curves]({name}.svg)",
        shown,
        "Mean ± standard deviation over seeds. Differences from random picks are paired by seed, with their 95 % "
        "interval (Student's); * where it leaves out zero. All strategies of a seed start from the same rows. Seeds "
        "share the pool and the test rows.",
        verdict(found),
        harness.markdown_facts(known),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(found: Curves) -> str:
    """Whether each strategy beat random picks, at the most rows that both have labelled, in a sentence each."""
    sentences = []
    for by in (by for by in found if by != "random" and "random" in found):
        both = set(found[by]) & set(found["random"]) - {min(found["random"])}
        difference = _difference(found, by, max(both), "nll") if both else None
        if difference is None or (mean := difference["mean"]) is None:
            continue
        apart = harness.excludes_zero(difference["low"], difference["high"])
        word = "is not shown to beat" if not apart else "beat" if mean < 0 else "was worse than"
        gap = f"NLL {abs(mean):.3f} nats {'lower' if mean < 0 else 'higher'} than that of random picks"
        sentences.append(
            f"With {max(both)} rows {TITLES[by]} {word} random: {gap}, interval {_shown(difference, 1, 3)}."
        )
    return " ".join(sentences)


def _difference(found: Curves, by: str, labelled: int, metric: str) -> dict[str, float | None] | None:
    """This strategy minus random, over the seeds that have both; None where there is nothing to compare."""
    if by == "random" or labelled not in found.get("random", {}):
        return None
    own, other = found[by][labelled], found["random"][labelled]
    seeds = sorted(own.keys() & other.keys())
    return harness.mean_with_interval([own[seed][metric] - other[seed][metric] for seed in seeds]) if seeds else None


def _shown(difference: Mapping[str, float | None] | None, scale: float, digits: int) -> str:
    if difference is None or difference["mean"] is None:
        return "–"
    mean = f"{scale * difference['mean']:+.{digits}f}"
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return mean
    ends = f"({scale * low:+.{digits}f} to {scale * high:+.{digits}f})"
    return f"{mean} {ends}{'*' if harness.excludes_zero(low, high) else ''}".replace("-", "−")


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def picture(found: Curves) -> str:
    """Accuracy and NLL against the rows labelled: means over seeds as lines, seeds as dots."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        FigureCanvasSVG(figure)
        panels = figure.subplots(1, 2)
        for axes, (metric, heading) in zip(panels, HEADINGS.items(), strict=True):
            for by, curve in found.items():
                colour, dashes = STYLE[by]
                labelled = sorted(curve)
                means = [statistics.fmean(f[metric] for f in curve[n].values()) for n in labelled]
                axes.plot(labelled, means, color=colour, linestyle=dashes, linewidth=1.7, label=TITLES[by])
                dots = [(n, figures[metric]) for n in labelled for figures in curve[n].values()]
                axes.scatter(*zip(*dots, strict=True), color=colour, s=9, alpha=0.6)
            axes.set(xlabel="rows labelled", ylabel=heading)
            axes.spines[["top", "right"]].set_visible(False)
        if found:
            panels[0].legend(frameon=False)
    return harness.svg(figure, NAME)


if __name__ == "__main__":
    main()
