"""How near the averaged class probabilities come to a long-run average, for each kind of draws and number of particles.

    python benchmarks/draws.py --run DIR [--rows 48] [--seeds 8] [--reference 4096]

The reference is an average over independent antithetic pairs of a seed of their own: unbiased, and nearer to the
expectation than as many independent draws, whose error would be as large as what is measured. The linearised
predictive, which draws nothing, stands in the same table. Writes docs/results/draws.{csv,json,md,svg}. Resumable: the
reference grows by blocks and every figure is kept, in a directory named after the adapter, the rows and the settings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core.console import progress_bar, quiet
from scalabl.core.files import ADAPTER, sha256, write_text, writing
from scalabl.data.load import rows_of
from scalabl.metrics.uncertainty import average
from scalabl.predictive import LinearizedPredictive, MonteCarloPredictive, predict
from scalabl.predictive.sampling import DRAWS
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.scoring import Batch, Encoded, Scorer
from scalabl.scoring.trunk_store import with_stored_trunk

BLOCK = 64  # particles of the reference between two saves
REFERENCE_SEED = 1_000_003  # of no other draws
ERRORS = {"rmse": "RMSE of the probabilities", "kl": "KL from the long run, nats"}
# Okabe and Ito's colours, which colour-blind readers tell apart; and a marker each
LOOKS = [("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "D"), ("#cc79a7", "^")]


@dataclass(frozen=True)
class Reference:
    """The long-run average.

    Attributes:
        probs: (n, C) averaged class probabilities, float64; 0 for choices a row lacks.
        variance: of one particle's probabilities around them, a mean over rows and choices.
        rmse: its own error, from the spread of the pairs' averages.
        particles: how many they are averaged over.
    """

    probs: Tensor
    variance: float
    rmse: float
    particles: int


class Part:
    """The particles first .. first + number - 1 of a predictive."""

    name = "part"

    def __init__(self, inner: MonteCarloPredictive, first: int, number: int) -> None:
        self.inner, self.first, self.number = inner, first, number

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        return self.inner.draw(scorer, batch, self.first, self.number)


def reference(
    run: Run, rows: Sequence[Encoded], particles: int, store: Path, *, batch_size: int, advance: Callable[[int], Any]
) -> Reference:
    """The average over many antithetic pairs; sums are saved after every block of them."""
    state: dict[str, Tensor] = load_file(store) if store.is_file() else {}
    done = int(state["particles"]) if state else 0
    advance(done)
    inner = MonteCarloPredictive(particles, seed=REFERENCE_SEED, draws="antithetic")
    while done < particles:
        number = min(BLOCK, particles - done)
        probs = predict(run.scorer, rows, Part(inner, done, number), batch_size=batch_size).double().exp()
        done += number
        pairs = probs.unflatten(0, (-1, 2)).mean(dim=1)
        sums = {"sum": probs, "squares": probs.square(), "pair_squares": pairs.square()}
        state = {name: state.get(name, 0) + values.sum(dim=0) for name, values in sums.items()}
        state["particles"] = torch.tensor(done)
        with writing(store) as unfinished:
            save_file(state, unfinished)
        advance(number)
    mean = state["sum"] / done
    present = _present(rows, mean)
    variance = float((state["squares"] / done - mean.square())[present].mean())
    number = done // 2
    of_pairs = float((state["pair_squares"] / number - mean.square()).clamp_min(0)[present].mean())
    return Reference(mean, variance, (of_pairs / (number - 1)) ** 0.5, done)


def averages(
    run: Run, rows: Sequence[Encoded], kind: str, samples: Sequence[int], seed: int, *, batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """Each N with its averaged probabilities (n, C); the first n of N particles serve for n where they are its own."""
    if kind == "moments":
        for number in samples:
            strategy = MonteCarloPredictive(number, seed=seed, draws=kind)
            yield number, average(predict(run.scorer, rows, strategy, batch_size=batch_size))
        return
    strategy = MonteCarloPredictive(max(samples), seed=seed, draws=kind)
    log_probs = predict(run.scorer, rows, strategy, batch_size=batch_size)
    for number in samples:
        yield number, average(log_probs[:number])


def errors(probs: Tensor, exact: Tensor, present: Tensor) -> dict[str, float]:
    """RMSE over rows and choices, and the mean over rows of KL(exact || probs) in nats."""
    difference = (probs - exact)[present]
    terms = torch.where(present, exact * (exact.clamp_min(1e-300).log() - probs.clamp_min(1e-300).log()), 0.0)
    return {"rmse": float(difference.square().mean().sqrt()), "kl": float(terms.sum(dim=1).mean())}


def _present(rows: Sequence[Encoded], probs: Tensor) -> Tensor:
    """(n, C) which choices a row has."""
    return torch.arange(probs.shape[1]) < torch.tensor([row.num_choices for row in rows])[:, None]


def measure(a: argparse.Namespace, run: Run, rows: Sequence[Encoded], directory: Path) -> tuple[Reference, list[dict]]:
    """Everything that is not yet in `directory`, and then all of it: one figure a kind, N and seed."""
    directory.mkdir(parents=True, exist_ok=True)
    kept = directory / "figures.json"
    figures: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    known = {(figure["draws"], figure["seed"]) for figure in figures}
    cost = {kind: sum(a.samples) if kind == "moments" else max(a.samples) for kind in DRAWS}
    with progress_bar() as progress:
        total = a.reference + a.seeds * sum(cost.values())
        bar = progress.add_task("particles", total=total, detail="long-run average")
        exact = reference(
            run, rows, a.reference, directory / "reference.safetensors", batch_size=a.batch_size,
            advance=lambda number: progress.advance(bar, number),
        )  # fmt: skip
        present = _present(rows, exact.probs)
        for seed in range(a.seeds):
            for kind in DRAWS:
                progress.update(bar, detail=f"{kind}, seed {seed}")
                if (kind, seed) not in known:
                    figures += [
                        {"draws": kind, "samples": number, "seed": seed, **errors(probs, exact.probs, present)}
                        for number, probs in averages(run, rows, kind, a.samples, seed, batch_size=a.batch_size)
                    ]
                    write_text(kept, json.dumps(figures) + "\n")
                progress.advance(bar, cost[kind])
    return exact, [figure for figure in figures if figure["seed"] < a.seeds]


def summarize(figures: Sequence[dict[str, Any]], variance: float) -> list[dict[str, Any]]:
    """One row a kind and N: {mean, sd, low, high} over seeds of each error, and what the draws are worth.

    `worth` is how many independent draws have the same mean squared error: variance / N for N of them.
    """
    rows = []
    for kind in DRAWS:
        for number in sorted({figure["samples"] for figure in figures}):
            own = [figure for figure in figures if (figure["draws"], figure["samples"]) == (kind, number)]
            squared = sum(figure["rmse"] ** 2 for figure in own) / len(own)
            row = {"draws": kind, "samples": number, "worth": variance / squared}
            rows.append(row | {name: harness.mean_with_interval([figure[name] for figure in own]) for name in ERRORS})
    return rows


def linearized(run: Run, rows: Sequence[Encoded], exact: Reference, *, batch_size: int) -> dict[str, float]:
    """The errors of the linearised predictive, and how many independent draws would have the first."""
    probs = average(predict(run.scorer, rows, LinearizedPredictive(), batch_size=batch_size).double())
    found = errors(probs, exact.probs, _present(rows, exact.probs))
    return {**found, "worth": exact.variance / found["rmse"] ** 2}


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    exact = content["reference"]
    linear = {"draws": "linearised", "samples": "–", **content["linearized"]}
    shown = harness.table(
        [*content["summary"], linear],
        ("draws", "{draws}"),
        ("N", "{samples}"),
        *((words, lambda row, name=name: _interval(row[name])) for name, words in ERRORS.items()),
        ("worth", "{worth:.1f}"),
    )
    note = (
        f"Against the average of {exact['particles'] // 2:,} independent antithetic pairs, whose own RMSE is "
        f"{exact['rmse']:.2g}, that of {exact['variance'] / exact['rmse'] ** 2:,.0f} independent draws. Mean and "
        "95 % interval (Student's) over seeds of the draws; the model and the rows are the same. Worth: how many "
        "independent draws have the same mean squared error (the variance of one particle's probabilities, from "
        "the long run, over it)."
    )
    return f"""# Kinds of draws: the error of N particles

![The error of the averaged probabilities against N, a line a kind of draws](draws.svg)

{shown}

{note}

{harness.markdown_facts(content["facts"])}
"""


def _interval(figure: dict[str, float | None] | float) -> str:
    if isinstance(figure, float):
        return f"{figure:.2e}"
    if figure["low"] is None or figure["high"] is None:
        return f"{figure['mean']:.2e}"
    return f"{figure['mean']:.2e} ({figure['low']:.2e} to {figure['high']:.2e})"


def picture(summary: Sequence[dict[str, Any]]) -> str:
    """The errors against N, both on logarithmic scales, as SVG."""
    with matplotlib.rc_context(harness.STYLE):
        drawing = Figure(figsize=(7.0, 3.0), layout="constrained", facecolor="white")
        panels = drawing.subplots(1, len(ERRORS))
    for axes, (error, words) in zip(panels, ERRORS.items(), strict=True):
        for kind, (colour, marker) in zip(DRAWS, LOOKS, strict=True):
            rows = [row for row in summary if row["draws"] == kind]
            numbers, means = [row["samples"] for row in rows], [row[error]["mean"] for row in rows]
            axes.plot(numbers, means, color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.grid(True, which="major", color="#d3d7db", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("particles, N")
        axes.set_title(words, fontsize=9)
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWS), frameon=False)
    return harness.svg(drawing, "draws")


def main() -> None:
    parser = harness.options(
        __doc__,
        run=(Path, "a finished run of ScalaBL"),
        data=(None, "what to predict; the run's own task by default, its test rows"),
        rows=48,
        samples=[2, 4, 8, 16, 32],
        seeds=(8, "how many, from 0"),
        reference=(4096, "particles of the long-run average, an even number"),
        batch_size=8,
        model=(None, "the base model, if it has moved"),
        work=(harness.ROOT / "runs" / "draws", "where figures are kept"),
        output=(harness.RESULTS, "directory of the results"),
    )
    a = parser.parse_args()
    if min(a.samples) < 2 or a.seeds < 1 or a.reference < 4 or a.reference % 2:
        parser.error("--samples must be at least 2, --seeds at least 1, --reference an even number from 4 on")
    quiet()
    run = load_run(a.run, model=a.model)
    if not run.is_bayesian:
        parser.error(f"{a.run} is not a run of ScalaBL")
    data = a.data or run.record.recipe["data"]
    examples = rows_of(data, limit=a.rows, labels=run.record.labels)
    rows = with_stored_trunk(run.scorer, run.encode(examples), batch_size=a.batch_size)
    made_from = [sha256(a.run / ADAPTER), sorted(a.samples), a.reference]
    made_from += [[row.id, row.question, row.choices] for row in examples]
    exact, figures = measure(a, run, rows, a.work / harness.digest(made_from))
    recipe = run.record.recipe
    content = {
        "facts": harness.facts(
            model=recipe["model"],
            run=f"{recipe['method']}, {recipe['steps']} steps on {recipe['data']}, seed {recipe['seed']}",
            data=f"{data}, {len(examples)} rows",
            seeds=f"0 to {a.seeds - 1}, of the draws",
        ),
        "reference": {"particles": exact.particles, "variance": exact.variance, "rmse": exact.rmse},
        "summary": summarize(figures, exact.variance),
        "linearized": linearized(run, rows, exact, batch_size=a.batch_size),
    }
    lines = harness.as_csv(figures, ("draws", "samples", "seed", *ERRORS))
    harness.write_results(a.output, "draws", content, markdown(content), lines, picture(content["summary"]))


if __name__ == "__main__":
    main()
