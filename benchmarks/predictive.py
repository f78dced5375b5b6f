"""Cost against quality: what each predictive takes beside one plain forward of the whole model, and how good it is.

    python benchmarks/predictive.py --run DIR_OF_4_CLASSES --run2 DIR_OF_2_CLASSES

Every strategy starts from tokens, and so does the plain forward that it is measured against: every layer at the
posterior mean, no stored trunk. Cost is the median over rounds of the ratio to the plain forward of the same round; the
order within a round is drawn anew. Those that run every layer for every particle do so in every third round. Memory is
what a pass adds to the loaded model, at its peak. Quality is that of the test rows, with intervals of the rows'
bootstrap, and of telling them from shifted ones by the entropy; KL is to the average of many particles of a seed of
their own.

Writes docs/results/predictive.{csv,json,md,svg}. Resumable: every round and every strategy's predictions are kept, in
a directory named after the adapter, the rows and the settings. About 15 minutes a run on one core for SmolLM2-135M with
adapters on the last 4 of 30 layers.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, ROOT, as_csv, digest, facts, load_average, options, write_results
from predictive_page import COLUMNS, judged, markdown, picture, summarize
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core.console import progress_bar, quiet
from scalabl.core.files import ADAPTER, sha256, write_text, writing
from scalabl.data import Example
from scalabl.data.load import rows_of
from scalabl.inference.predictor import labels_of
from scalabl.inference.variance import run_variance, top_holding
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MeanPredictive, MonteCarloPredictive, Predictive
from scalabl.predictive import predict as predict_rows
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.predictive.base import chosen
from scalabl.predictive.cost import cost_of
from scalabl.predictive.monte_carlo import first_difference
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.scoring import Batch, Encoded, Scorer
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.study.work import measured

PLAIN = "plain forward"
LONG = "long-run average"
LONG_SEED = 1_000_003  # of no other draws


class Passes:
    """N particles one after the other, each a pass of its own."""

    name = "passes"

    def __init__(self, inner: MonteCarloPredictive) -> None:
        self.inner = inner

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return torch.cat([self.inner.draw(scorer, batch, i, 1) for i in range(self.inner.samples)])


@dataclass(frozen=True)
class Strategy:
    """One line of the table.

    Attributes:
        name: as in the table.
        make: the predictive.
        trunk: whether what lies below the lowest stochastic layer is run once; else every layer for every particle.
        timed_as, judged_as: the strategy whose passes, or whose predictions, are the same.
    """

    name: str
    make: Callable[[], Predictive]
    trunk: bool = True
    timed_as: str | None = None
    judged_as: str | None = None


def strategies(samples: int, top: str) -> list[Strategy]:
    """All of them; `top`: the layers of the restricted linearisation, "last:K"."""
    mc, passes = f"mc, N = {samples}", f"mc, N = {samples}, {samples} passes"
    found = [
        Strategy("mean", MeanPredictive),
        Strategy(passes, lambda: Passes(MonteCarloPredictive(samples)), trunk=False, judged_as=mc),
        Strategy(f"{mc}, one batch", lambda: MonteCarloPredictive(samples), trunk=False, judged_as=mc),
        Strategy(mc, lambda: MonteCarloPredictive(samples)),
    ]
    for number in (4, 6):
        for kind in ("antithetic", "sobol", "moments"):
            found.append(
                Strategy(
                    f"{kind}, N = {number}",
                    lambda kind=kind, number=number: MonteCarloPredictive(number, draws=kind),  # type: ignore[misc]
                    timed_as=None if kind == "antithetic" else f"antithetic, N = {number}",
                )
            )
    return [
        *found,
        Strategy(f"adaptive, N ≤ {samples}", lambda: AdaptivePredictive(MonteCarloPredictive(samples))),
        Strategy("linearized", LinearizedPredictive),
        Strategy(f"linearized, s in {top}", lambda: LinearizedPredictive(stochastic_layers=top)),
        Strategy("auto", lambda: AutoPredictive(samples)),
    ]


def as_wide(row: Example, classes: int) -> Example:
    """The row with its right choice and so many others: entropies are compared between rows of like choices."""
    if len(row.choices) <= classes or row.answer is None:
        return row
    generator = random.Random(row.id)
    others = [i for i in range(len(row.choices)) if i != row.answer]
    kept = sorted([row.answer, *generator.sample(others, classes - 1)])
    return replace(row, choices=tuple(row.choices[i] for i in kept), answer=kept.index(row.answer))


@dataclass
class Bench:
    """A run with its rows and the directory of what is known.

    Attributes:
        run: a finished run of ScalaBL.
        classes: choices of a row.
        data: name -> rows: "test", "ood".
        kept: where figures and predictions are kept.
        lines: the strategies.
        names: of the data, for people.
    """

    run: Run
    classes: int
    data: dict[str, list[Example]]
    kept: Path
    lines: list[Strategy]
    names: str

    def scorer(self, strategy: Strategy) -> Scorer:
        own = self.run.scorer
        return own if strategy.trunk else Scorer(own.model, own.scoring)


def judge(bench: Bench, a: argparse.Namespace, advance: Callable[[str], None]) -> None:
    """The predictions of every strategy, one file each; those that are there are not made again."""
    encoded = {name: bench.run.encode(rows) for name, rows in bench.data.items()}
    encoded["long"] = encoded["test"][: a.reference_rows]
    stored: dict[str, list[Encoded]] = {}

    def write(name: str, parts: Sequence[str], predictive: Predictive) -> None:
        path = predictions_of(bench, name)
        if path.is_file():
            return
        for part in parts:  # the trunk is the same for all: computed once
            if part not in stored:
                stored[part] = with_stored_trunk(bench.run.scorer, encoded[part], batch_size=a.batch_size)
        found = {
            part: predict_rows(bench.run.scorer, stored[part], predictive, batch_size=a.batch_size).contiguous()
            for part in parts
        }
        metadata = {}
        if isinstance(predictive, AutoPredictive) and predictive.choice is not None:
            metadata["choice"] = predictive.choice.sentence
        write_text(path.with_suffix(".json"), json.dumps(metadata) + "\n")
        with writing(path) as unfinished:
            save_file(found, unfinished)

    for strategy in bench.lines:
        if strategy.judged_as is None:
            advance(f"{bench.classes} classes: {strategy.name}")
            write(strategy.name, ("test", "ood"), strategy.make())
    advance(f"{bench.classes} classes: {LONG}")
    write(LONG, ("long",), MonteCarloPredictive(a.reference, seed=LONG_SEED))


def predictions_of(bench: Bench, name: str) -> Path:
    """The file of a strategy's predictions."""
    return bench.kept / f"{''.join(c if c.isalnum() else '-' for c in name)}.safetensors"


def weigh(bench: Bench, a: argparse.Namespace, batch: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Seconds a round and peak memory of every strategy at a batch size; goes on behind the last whole round."""
    path = bench.kept / f"cost-{batch}.json"
    known: dict[str, Any] = {"rounds": [], "memory": {}, "choice": None}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    timed = {s.name: s for s in bench.lines if s.timed_as is None}
    # rows of middling length, of like length as in a batch of predictions
    rows = sorted(bench.run.encode(bench.data["test"]), key=lambda row: len(row.input_ids))
    start = max(0, (len(rows) - batch) // 2)
    few = [rows[(start + i) % len(rows)] for i in range(batch)]
    whole = Scorer(bench.run.scorer.model, bench.run.scorer.scoring)
    tokens = whole.scoring.collate(few).to(whole.device)
    made: dict[str, tuple[Scorer, Predictive]] = {PLAIN: (whole, MeanPredictive())}
    if len(known["rounds"]) < a.rounds:
        for name, strategy in timed.items():
            scorer = bench.scorer(strategy)
            predictive = strategy.make()
            if isinstance(predictive, AutoPredictive):
                inner = chosen(predictive, scorer, rows, batch)  # by the rows, before any clock runs
                known["choice"] = predictive.choice.name if predictive.choice else None
                predictive = inner
            made[name] = scorer, predictive
        if set(known["memory"]) < set(made):
            known["memory"] = {name: _peak(*pair, tokens) for name, pair in made.items()}
            write_text(path, json.dumps(known) + "\n")
        else:  # a call that goes on has to warm up too
            for pair in made.values():
                _seconds(*pair, tokens)
    slow: set[str] = {name for name, strategy in timed.items() if not strategy.trunk}
    for number in range(a.rounds):
        advance(f"{bench.classes} classes: cost at batch {batch}")
        if number < len(known["rounds"]):
            continue
        names = [name for name in made if name not in slow or number % 3 == 0]
        order = random.Random(1000 * batch + number).sample(names, len(names))
        known["rounds"].append({name: _seconds(*made[name], tokens) for name in order})
        write_text(path, json.dumps(known) + "\n")
    return known


@torch.no_grad()
def _seconds(scorer: Scorer, predictive: Predictive, batch: Batch) -> float:
    _synchronize()
    start = time.perf_counter()
    predictive(scorer, batch)
    _synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def _peak(scorer: Scorer, predictive: Predictive, batch: Batch) -> float:
    """MiB that a pass adds to what is there before it, at its peak; the second pass of two, so that nothing is new."""
    predictive(scorer, batch)
    _give_back()
    with measured() as before:
        pass
    with measured() as cost:
        predictive(scorer, batch)
    return max(0.0, cost.peak_memory - before.peak_memory)


def _give_back() -> None:
    """Freed memory back to the system, so that a peak is what lives."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # glibc's
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bench_of(directory: Path, ood: str, a: argparse.Namespace) -> Bench:
    """A run with its rows.

    Raises:
        SystemExit: it is no run of ScalaBL.
    """
    run = load_run(directory, model=a.model)
    if not run.is_bayesian:
        raise SystemExit(f"{directory} is not a run of ScalaBL; give one.")
    task, labels = run.record.recipe["data"], run.record.labels
    test = rows_of(task, limit=a.rows, labels=labels)
    classes = max(len(row.choices) for row in test)
    shifted = [as_wide(row, classes) for row in rows_of(ood, limit=a.ood_rows, labels=labels)]
    settings = [sha256(directory / ADAPTER), a.samples, a.reference, a.reference_rows, a.top]
    settings += [[[row.id, row.question, row.choices, row.answer] for row in rows] for rows in (test, shifted)]
    kept = a.work / digest(settings)
    kept.mkdir(parents=True, exist_ok=True)
    top = kept / "top.json"
    if not top.is_file():
        layers = a.top
        if layers.startswith("variance:"):
            layers = top_holding(run_variance(run, limit=a.variance_rows), float(layers.partition(":")[2]))
        write_text(top, json.dumps(layers) + "\n")
    lines = strategies(a.samples, json.loads(top.read_text(encoding="utf-8")))
    names = f"{task}, {len(test)} rows; shifted: {ood}, {len(shifted)} rows"
    return Bench(run, classes, {"test": test, "ood": shifted}, kept, lines, names)


def main() -> None:
    """Measure what is not yet known, and write the results."""
    parser = options(
        __doc__,
        run=(Path, "a finished run of ScalaBL, of 4 classes"),
        run2=(None, "another one, of 2 classes"),
        ood=("mmlu-chemistry", "rows to tell from those of --run"),
        ood2=("mmlu-chemistry", "of --run2; rows with more choices are cut to as many"),
        rows=(150, "test rows"),
        ood_rows=100,
        samples=(10, "N of mc"),
        reference=(200, "particles of the long-run average"),
        reference_rows=(50, "test rows that it is taken of"),
        top=("variance:0.9", "layers of the restricted linearisation"),
        variance_rows=(30, "validation rows for their shares of the variance"),
        batches=[1, 8, 32],
        rounds=5,
        batch_size=(8, "of the predictions that are judged"),
        model=(None, "the base model, if it has moved"),
        work=(ROOT / "runs" / "predictive", "where figures are kept"),
        output=(RESULTS, "directory of the results"),
    )
    a = parser.parse_args()
    if a.rounds < 1 or a.samples < 2 or a.reference < 2:
        parser.error("--rounds must be at least 1, --samples and --reference at least 2")
    quiet()
    load = load_average()
    benches = [bench_of(a.run, a.ood, a)]
    if a.run2 is not None:
        benches.append(bench_of(Path(a.run2), a.ood2, a))
        if benches[0].classes == benches[1].classes:
            parser.error(f"both runs have {benches[0].classes} classes; give runs of different numbers")
    rows: list[dict[str, Any]] = []
    choices: dict[str, Any] = {}
    for bench in benches:
        of_bench, choices[str(bench.classes)] = figures_of(bench, a)
        rows += of_bench
    recipe = benches[0].run.record.recipe
    content = {
        "facts": facts(
            model=recipe["model"],
            adapters=f"r = {recipe['r']}, {recipe['target_modules']}, {recipe['layers']} of the layers",
            data=" | ".join(f"{bench.classes} classes: {bench.names}" for bench in benches),
            reference=f"{a.reference} particles, on {a.reference_rows} of the test rows",
            rounds=f"{a.rounds}; {torch.get_num_threads()} threads; load {load} before, {load_average()} after",
        ),
        "samples": a.samples,
        "choices": choices,
        "rows": rows,
    }
    drawn = picture(rows, 8 if 8 in a.batches else a.batches[0])
    write_results(a.output, "predictive", content, markdown(content), csv_of(rows), drawn)


def figures_of(bench: Bench, a: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a run's strategies, and what `auto` chose there."""
    steps = sum(s.judged_as is None for s in bench.lines) + 1 + a.rounds * len(a.batches)
    with progress_bar() as progress:
        bar = progress.add_task("predictives", total=steps, detail="")

        def advance(detail: str) -> None:
            progress.update(bar, advance=1, detail=detail)

        judge(bench, a, advance)
        costs = {batch: weigh(bench, a, batch, advance) for batch in a.batches}
    found = {s.name: load_file(predictions_of(bench, s.judged_as or s.name)) for s in bench.lines}
    long, mc = load_file(predictions_of(bench, LONG))["long"], f"mc, N = {a.samples}"
    quality = judged(found, long, labels_of(bench.data["test"]), mc)
    encoded = bench.run.encode(bench.data["test"])
    start = first_difference(bench.run.scorer.model, None) or 0
    modelled: dict[int, dict[str, float]] = {}
    for batch in a.batches:
        model = cost_of(bench.run.scorer, encoded, batch)
        modelled[batch] = {"linearized": model.linearized(start), mc: model.mc(a.samples, start)}
    timed = {s.name: s.timed_as or s.name for s in bench.lines}
    sentence = json.loads(predictions_of(bench, "auto").with_suffix(".json").read_text(encoding="utf-8"))
    choice = {"data": bench.names, "quality": sentence.get("choice")}
    choice |= {str(batch): known["choice"] for batch, known in costs.items()}
    return summarize(bench.classes, timed, costs, quality, modelled, PLAIN), choice


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """One line a strategy, number of classes and batch size; empty where a figure is not defined."""
    return as_csv([{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows], COLUMNS)


if __name__ == "__main__":
    main()
