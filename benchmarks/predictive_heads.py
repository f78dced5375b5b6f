"""Heads of many classes: what each predictive costs, and how near it is to an average over many particles.

    python benchmarks/predictive_heads.py --runs RUN_OF_20_CLASSES RUN_OF_77_CLASSES RUN_OF_150_CLASSES

The reference is the average of many antithetic particles of a seed of their own. Errors against it are root mean
squares over test rows (and classes), and over seeds where there are particles: of the probabilities, and of the
epistemic part of the uncertainty; KL is from the reference, in nats. Costs are those of `auto`'s model, in plain
forwards, and medians over rounds of seconds beside those of one plain forward (every layer, from tokens) in the same
round.

Writes docs/results/predictive_heads.{csv,json,md,svg}. A run's figures are kept, by its adapter and the settings: a
second start goes on behind the last run that is known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from draws import LOOKS, errors
from harness import (
    RESULTS,
    ROOT,
    STYLE,
    as_csv,
    digest,
    facts,
    interleaved,
    kept,
    load_average,
    markdown_facts,
    median_with_interval,
    options,
    svg,
    table,
    write_results,
)
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from scalabl.core.console import quiet
from scalabl.core.files import ADAPTER, sha256
from scalabl.core.modules import eval_mode
from scalabl.data.load import rows_of
from scalabl.inference.predictor import labels_of
from scalabl.metrics import paired_difference
from scalabl.metrics.uncertainty import average, decompose
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MeanPredictive, MonteCarloPredictive, Predictive
from scalabl.predictive import predict as predict_rows
from scalabl.predictive.cost import cost_of
from scalabl.predictive.monte_carlo import first_difference
from scalabl.runs.loading import load_run
from scalabl.scoring import Encoded, Scorer
from scalabl.scoring.trunk_store import with_stored_trunk

REFERENCE_SEED = 1_000_003  # of no other draws
PLAIN = "plain forward"
FEW = (("antithetic", 2), ("moments", 3), ("moments", 4))
COLUMNS = (
    "classes", "strategy", "modelled", "measured", "measured_low", "measured_high", "probability_error", "kl",
    "epistemic_error", "epistemic_mean", "nll_minus_reference", "nll_low", "nll_high",
)  # fmt: skip

NOTE = """\
Errors and KL are those of the reference's, beside those of N = {samples} particles: 1 is as good, below 1 is better; in
brackets, what N = {samples} is wrong by. Cost: plain forwards of the whole model by `auto`'s cost model, and measured
(median over rounds, paired). The epistemic mean is over rows, beside the reference's. NLL: minus the reference's, of
the first seed, 95 % interval of the paired rows."""


def strategies(samples: int, tops: Sequence[int], classes: int) -> dict[str, Callable[[int], Predictive]]:
    """All of them by name, made for a seed."""
    found: dict[str, Callable[[int], Predictive]] = {
        "mean": lambda _: MeanPredictive(),
        f"mc, N = {samples}": lambda seed: MonteCarloPredictive(samples, seed=seed),
    }
    for kind, number in FEW:
        found[f"{kind}, N = {number}"] = lambda seed, kind=kind, number=number: MonteCarloPredictive(  # type: ignore[misc]
            number, seed=seed, draws=kind
        )
    for top in tops:
        if top < classes - 1:
            found[f"linearized, top {top} of the classes"] = lambda seed, top=top: LinearizedPredictive(  # type: ignore[misc]
                seed=seed, top_classes=top
            )
    return found


def modelled(predictive: Predictive, scorer: Scorer, encoded: Sequence[Encoded], batch: int) -> float:
    """A strategy's cost by `auto`'s model."""
    cost = cost_of(scorer, encoded, batch)
    start = first_difference(scorer.model, getattr(predictive, "stochastic_layers", None)) or 0
    if isinstance(predictive, MonteCarloPredictive):
        return cost.mc(predictive.samples, start)
    if isinstance(predictive, LinearizedPredictive):
        return cost.linearized(start, predictive.top_classes if predictive.feature_variance is None else 1)
    return 1.0


@torch.no_grad()
def seconds_of(scorer: Scorer, rows: list[Encoded]) -> Callable[[Predictive], float]:
    """Seconds of a predictive on a batch."""
    batch = scorer.scoring.collate(rows).to(scorer.device)

    def seconds(predictive: Predictive) -> float:
        start = time.perf_counter()
        with eval_mode(scorer.model):
            predictive(scorer, batch)
        return time.perf_counter() - start

    return seconds


def quality(several: Sequence[Tensor], reference: Tensor, epistemic: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the log class probabilities (N, n, C) of several seeds are worth beside the reference's (n, C) and (n,)."""
    of_p = [errors(average(each), reference, reference > 0) for each in several]
    of_epistemic = [decompose(each).epistemic for each in several]
    nll = paired_difference(average(several[0]), reference, labels, "nll")
    return {
        "probability_error": root_mean([each["rmse"] for each in of_p]),
        "kl": sum(each["kl"] for each in of_p) / len(several),
        "epistemic_error": root_mean([float((each - epistemic).square().mean().sqrt()) for each in of_epistemic]),
        "epistemic_mean": float(torch.stack(of_epistemic).mean()),
        "nll_minus_reference": nll.value, "nll_low": nll.low, "nll_high": nll.high,
    }  # fmt: skip


def root_mean(values: Sequence[float]) -> float:
    """The root mean square."""
    return math.sqrt(sum(value**2 for value in values) / len(values))


def figures_of(directory: Path, a: Any) -> dict[str, Any]:
    """The rows of a run's strategies."""
    run = load_run(directory)
    recipe = run.record.recipe
    rows = rows_of(recipe["data"], limit=a.rows, labels=run.record.labels)
    tokens, labels = run.encode(rows), labels_of(rows)
    classes = tokens[0].num_choices
    encoded = with_stored_trunk(run.scorer, tokens, batch_size=a.batch)

    def log_probs(predictive: Predictive) -> Tensor:
        return predict_rows(run.scorer, encoded, predictive, batch_size=a.batch)

    long = log_probs(MonteCarloPredictive(a.reference, seed=REFERENCE_SEED, draws="antithetic"))
    reference, epistemic = average(long), decompose(long).epistemic
    made = strategies(a.samples, a.tops, classes)
    auto = AutoPredictive(a.samples)
    auto.chosen(run.scorer, tokens, batch_size=a.batch)
    assert (choice := auto.choice) is not None
    for name, predictive in (*choice.refused.items(), (choice.name, choice.predictive)):
        made.setdefault(name, lambda _, predictive=predictive: predictive)
    # a batch of rows of middling length, from tokens, as auto's model has it
    by_length = sorted(tokens, key=lambda row: len(row.input_ids))
    first = max(0, (len(tokens) - a.batch) // 2)
    few = by_length[first : first + a.batch]
    timed = {name: make(0) for name, make in made.items()}
    own, whole = seconds_of(run.scorer, few), seconds_of(Scorer(run.scorer.model, run.scoring), few)
    for each in timed.values():
        own(each)  # warm
    times = interleaved(
        [*timed, PLAIN], a.rounds, 0, lambda name: whole(MeanPredictive()) if name == PLAIN else own(timed[name])
    )
    found = []
    for name, make in made.items():
        seeds = a.seeds if isinstance(timed[name], MonteCarloPredictive) else 1
        of_name = quality([log_probs(make(seed)) for seed in range(seeds)], reference, epistemic, labels)
        cost = median_with_interval([t / p for t, p in zip(times[name], times[PLAIN], strict=True)])
        found.append({
            "classes": classes, "strategy": name, "modelled": modelled(timed[name], run.scorer, tokens, a.batch),
            "measured": cost["median"], "measured_low": cost["low"], "measured_high": cost["high"], **of_name,
        })  # fmt: skip
    return {
        "classes": classes, "rows": found, "sentence": choice.sentence, "chosen": choice.name,
        "epistemic": float(epistemic.mean()), "load": load_average(), "model": recipe["model"],
        "data": f"{Path(recipe['data']).name}, {run.record.rows['train']} training rows, {len(rows)} test rows",
        "adapters": f"r = {recipe['r']}, {recipe['layers']} of the layers, {recipe['steps']} steps",
    }  # fmt: skip


def of_n(bench: dict[str, Any], samples: int) -> dict[str, Any]:
    """The row of N particles."""
    row: dict[str, Any] = next(row for row in bench["rows"] if row["strategy"] == f"mc, N = {samples}")
    return row


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    parts = ["# Heads of many classes: cost against quality", "![Cost against errors](predictive_heads.svg)"]
    parts.append(NOTE.format(samples=content["samples"]))
    for bench in content["runs"]:
        n = of_n(bench, content["samples"])

        def beside(key: str, n: dict[str, Any] = n) -> Callable[[dict[str, Any]], str]:
            return lambda row: f"{row[key] / n[key]:.2f}"

        shown = table(
            bench["rows"],
            ("strategy", lambda row, own=bench["chosen"]: row["strategy"] + " (auto)" * (row["strategy"] == own)),
            ("cost", "{modelled:.2f}"),
            ("measured", "{measured:.2f} ({measured_low:.2f} to {measured_high:.2f})"),
            (f"error of p ({n['probability_error']:.1e})", beside("probability_error")),
            (f"KL ({n['kl']:.1e})", beside("kl")),
            (f"error of the epistemic part ({n['epistemic_error']:.1e})", beside("epistemic_error")),
            ("epistemic mean", lambda row, of=bench["epistemic"]: f"{row['epistemic_mean'] / of:.2f}"),
            ("NLL − reference", "{nll_minus_reference:+.4f} ({nll_low:+.4f} to {nll_high:+.4f})"),
        )  # fmt: skip
        parts += [f"## {bench['classes']} classes: {bench['data']}", shown, bench["sentence"]]
    return "\n\n".join([*parts, markdown_facts(content["facts"])])


def picture(content: dict[str, Any]) -> str:
    """Cost against the two errors beside those of N particles, a column of panels a run, as SVG."""
    runs, plain = content["runs"], FuncFormatter(lambda value, _: f"{value:g}")
    names = list(dict.fromkeys(row["strategy"] for bench in runs for row in bench["rows"]))
    looks = {name: (LOOKS[i % 4][0], "osD^vP*X"[i // 4]) for i, name in enumerate(names)}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(3 * len(runs) + 2.6, 5), layout="constrained", facecolor="white")
        panels = drawing.subplots(2, len(runs), squeeze=False, sharex=True, sharey="row")
    for column, bench in enumerate(runs):
        n = of_n(bench, content["samples"])
        for axes, key, words in zip(
            panels[:, column],
            ("probability_error", "epistemic_error"),
            ("probabilities", "epistemic part"),
            strict=True,
        ):
            for row in bench["rows"]:
                colour, marker = looks[row["strategy"]]
                axes.plot(row["measured"], row[key] / n[key], marker, color=colour, markersize=6)
            axes.axhline(1, color="#9aa0a6", linewidth=0.8)
            axes.axvline(2, color="#9aa0a6", linewidth=0.8, linestyle=":")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(plain)  # less than a decade: the powers of ten alone would be one line
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(f"error: {words}")
        panels[0, column].set_title(f"{bench['classes']} classes", fontsize=9)
        panels[1, column].set_xlabel("cost, plain forwards")
    for name, (colour, marker) in looks.items():
        panels[0, 0].plot([], [], marker, color=colour, label=name)
    drawing.legend(loc="outside right center", frameon=False, fontsize=7)
    return svg(drawing, "predictive_heads")


def main() -> None:
    """Measure what is not yet known, and write the results."""
    parser = options(
        __doc__,
        runs=([Path()], "finished runs of ScalaBL with classification heads"),
        rows=(32, "test rows"),
        samples=(10, "N of mc"),
        seeds=(2, "of particles"),
        reference=(80, "particles of the reference"),
        tops=[1, 8],
        batch=(16, "rows at a time"),
        rounds=3,
        work=(ROOT / "runs" / "predictive_heads", "where figures are kept"),
        output=(RESULTS, "directory of the results"),
    )
    a = parser.parse_args()
    quiet()
    runs = []
    for directory in a.runs:
        made_from = [sha256(directory / ADAPTER), a.rows, a.samples, a.seeds, a.reference, a.tops, a.batch, a.rounds]
        path = a.work / f"{digest(made_from)}.json"
        runs.append(kept(path, lambda m=made_from: m, lambda d=directory: figures_of(d, a)))  # type: ignore[misc]
    runs.sort(key=lambda bench: bench["classes"])
    known = {
        "model": ", ".join(dict.fromkeys(f"{bench['model']}, {bench['adapters']}" for bench in runs)),
        "data": " | ".join(f"{bench['classes']} classes: {bench['data']}" for bench in runs),
        "reference": f"{a.reference} antithetic particles",
        "seeds": f"0 to {a.seeds - 1} of the particles",
        "rounds": f"{a.rounds}, {a.batch} rows a batch; {torch.get_num_threads()} threads; load "
        + ", ".join(bench["load"] for bench in runs),
    }
    content = {"facts": facts(**known), "samples": a.samples, "runs": runs}
    csv = as_csv([row for bench in runs for row in bench["rows"]], COLUMNS)
    write_results(a.output, "predictive_heads", content, markdown(content), csv, picture(content))


if __name__ == "__main__":
    main()
