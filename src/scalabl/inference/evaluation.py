"""A run on data: predictions of every particle, raw and with a temperature, gathered into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl.core import processes
from scalabl.core.progress import progress_bar
from scalabl.data.example import Example
from scalabl.inference.promise import Promise, held_out_rows
from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.variance import as_top_layers
from scalabl.metrics.selective import Threshold
from scalabl.metrics.temperature import apply_temperature, fit_temperature
from scalabl.metrics.uncertainty import average, mean_particles
from scalabl.predictive.adaptive import AdaptivePredictive, with_sampling
from scalabl.predictive.auto import AutoPredictive
from scalabl.predictive.base import Predictive
from scalabl.predictive.over_ranks import predict
from scalabl.predictive.sampling import PLAIN, Sampling
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.registry import METHODS
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.tuner.diagnostics import summarize, warnings_of, weights_of
from scalabl.tuner.layers import prior_of


def log_probabilities(
    run: Run, rows: Sequence[Example], predictive: Predictive, *, batch_size: int = 8, description: str = "predicting"
) -> Tensor:
    """(N, n, C) log class probabilities, with a progress bar; several processes share the work and all get them.

    Raises:
        UserError: rows that the run's scoring cannot encode.
    """
    encoded = run.encode(list(rows))
    encoded = processes.first_on_each_machine(lambda: with_stored_trunk(run.scorer, encoded, batch_size=batch_size))
    with progress_bar() as progress:
        bar = progress.add_task(description, total=len(encoded), detail="")
        return predict(
            run.scorer, encoded, predictive, batch_size=batch_size, advance=lambda n: progress.advance(bar, n)
        )


def answers(rows: Sequence[Example]) -> Tensor:
    """(n,) the right choices."""
    return torch.tensor([row.answer for row in rows])


def evaluate_run(
    directory: Path,
    rows: Sequence[Example],
    shifted: Mapping[str, Sequence[Example]],
    held_out: Sequence[Example],
    *,
    data: str,
    predictive: str | None = None,
    samples: int = 10,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    stochastic_layers: str | None = None,
    batch_size: int = 8,
    promise: Promise | None = None,
    model: str | None = None,
) -> Report:
    """Evaluate a run directory.

    Args:
        directory: the run.
        rows: labelled rows to test on.
        shifted: labelled rows of other data sets, by name.
        held_out: validation rows to fit a temperature on; none leaves the tempered row out.
        data: what `rows` are called.
        predictive: "mean", "mc", "linearized" or "auto"; None is what the record says, else auto.
        samples: N of mc.
        seed: of the particles.
        sampling: the kind of draws, and adaptive N.
        stochastic_layers: draw s in these alone, as in `Run.predictive`.
        batch_size: questions at a time.
        promise: an error rate, by the score probability: its threshold from the run's own held-out rows is marked.
        model: the base model, if it has moved.
    """
    run = load_run(directory, model=model)
    strategy = make_strategy(
        run, predictive, samples=samples, seed=seed, sampling=sampling, stochastic_layers=stochastic_layers
    )
    strategy, why = choose(run, strategy, rows, batch_size=batch_size)
    result = method_result(run, describe_method(run, strategy), rows, shifted, strategy, batch_size=batch_size)
    result.notes[:0] = why
    if promise is not None:
        result.threshold = threshold_of(run, promise, strategy, batch_size=batch_size)
        result.notes.append(_kept(result, promise, result.threshold))
    methods = [result]
    if held_out:
        validation = log_probabilities(run, held_out, strategy, batch_size=batch_size, description="temperature")
        methods.append(tempered(result, fit_temperature(validation, answers(held_out))))
    recipe = run.record.recipe
    return Report(
        title=f"{recipe['model']} on {data}",
        facts={
            "model": recipe["model"],
            "data": f"{data}, {len(rows):,} rows",
            "trained on": f"{run.record.task['name']}, {run.record.rows['train']:,} rows, {recipe['steps']} steps",
            "seed": str(recipe["seed"]),
            "versions": ", ".join(f"{k} {v}" for k, v in run.record.versions.items()),
            "device": run.record.device,
        },
        methods=methods,
        questions=[(row.question, row.choices) for row in rows],
    )


def _kept(result: MethodResult, promise: Promise, threshold: Threshold) -> str:
    """What a threshold promises, and what became of it on the rows of the report."""
    given = torch.from_numpy(promise.answered(threshold, result.log_probs))
    wrong = (average(result.log_probs).argmax(dim=1) != result.labels) & given
    found = f"{int(given.sum()):,} of {len(given):,} rows answered, {int(wrong.sum()):,} of them wrong"
    return f"{promise.describe(threshold)}: {found}. {threshold.sentence}"


def default_predictive(run: Run) -> str:
    """What the run's record says; else mc where the method averages over particles."""
    return run.record.predictive or ("mc" if run.is_sampled else "mean")


def make_strategy(
    run: Run,
    predictive: str | None,
    *,
    samples: int = 10,
    seed: int = 0,
    sampling: Sampling = PLAIN,
    stochastic_layers: str | None = None,
) -> Predictive:
    """The predictive of a run, as a user names it.

    Args:
        run: a loaded run.
        predictive: as in `Run.predictive`; None is "auto", or mc where the draws are given.
        samples: N.
        seed: of the particles.
        sampling: the kind of draws, and adaptive N.
        stochastic_layers: as in `Run.predictive`; or "variance:0.9", the fewest top layers that hold so much of the
            predictive variance on the run's validation rows.

    Raises:
        UserError: settings that the run or the predictive does not have.
    """
    if predictive in (None, "auto"):
        predictive = "auto" if sampling.is_plain else "mc"
    if stochastic_layers is not None and run.is_bayesian and predictive != "mean":
        spec = stochastic_layers
        stochastic_layers = processes.on_main(lambda: as_top_layers(run, spec))
    strategy = run.predictive(predictive, samples=samples, seed=seed, stochastic_layers=stochastic_layers)
    return with_sampling(strategy, sampling)


def choose(
    run: Run, strategy: Predictive, rows: Sequence[Example], *, batch_size: int = 8
) -> tuple[Predictive, list[str]]:
    """What `auto` takes for these rows, and its sentence; any other predictive as it is, and no sentence.

    Raises:
        UserError: rows that the run's scoring cannot encode.
    """
    if not isinstance(strategy, AutoPredictive):
        return strategy, []
    encoded = run.encode(list(rows))

    def decide() -> tuple[str, str | None, str]:
        with progress_bar() as progress:
            progress.add_task("choosing a predictive", total=None, detail="")
            made: Any = strategy.chosen(run.scorer, encoded, batch_size=batch_size)
        assert strategy.choice is not None
        return made.name, made.stochastic_layers, strategy.choice.sentence

    name, layers, sentence = processes.on_main(decide)
    return strategy.made(name, layers), [sentence]


def describe_method(run: Run, predictive: Predictive) -> str:
    """As in a table: "plain LoRA", "MAP", "ScalaBL, mean", "ScalaBL, N = 10"."""
    title = METHODS[run.record.method].title
    if not run.is_sampled:
        return title
    number = getattr(predictive, "samples", None)
    kind = getattr(predictive, "draws", "independent")
    suffix = "" if kind == "independent" else f", {kind}"
    layers = getattr(predictive, "stochastic_layers", None)
    suffix += "" if layers is None else f", s in {layers}"
    return f"{title}, {predictive.name if number is None else f'N = {number}'}{suffix}"


def method_result(
    run: Run,
    name: str,
    rows: Sequence[Example],
    shifted: Mapping[str, Sequence[Example]],
    predictive: Predictive,
    *,
    batch_size: int = 8,
) -> MethodResult:
    """One row of a report."""
    log_probs = log_probabilities(run, rows, predictive, batch_size=batch_size, description=name)
    return MethodResult(
        name=name,
        log_probs=log_probs,
        labels=answers(rows),
        ood={
            other: log_probabilities(run, others, predictive, batch_size=batch_size, description=f"{name}: {other}")
            for other, others in shifted.items()
        },
        ood_labels={other: answers(others) for other, others in shifted.items()},
        notes=posterior_warnings(run) + adaptive_notes(log_probs, predictive),
    )


def tempered(result: MethodResult, temperature: float) -> MethodResult:
    """The same predictions with a temperature, as a row of its own."""
    return MethodResult(
        name=f"{result.name} + T",
        log_probs=apply_temperature(result.log_probs, temperature),
        labels=result.labels,
        ood={name: apply_temperature(log_probs, temperature) for name, log_probs in result.ood.items()},
        ood_labels=result.ood_labels,
        notes=[f"temperature {temperature:.2f}, fitted on validation rows"],
    )


def adaptive_notes(log_probs: Tensor, predictive: Predictive) -> list[str]:
    """How many particles a row took on average, in words; empty where every row takes all."""
    if not isinstance(predictive, AdaptivePredictive):
        return []
    return [
        f"{mean_particles(log_probs):.1f} of at most {log_probs.shape[0]} particles a row on average; the decision is "
        f"that of all with confidence {predictive.confidence:g} ({predictive.bound} bound)"
    ]


def posterior_warnings(run: Run) -> list[str]:
    """What is wrong with a posterior, in words; empty for a plain LoRA."""
    if not run.is_bayesian:
        return []
    model = run.scorer.model
    return run.record.warnings + warnings_of(summarize(weights_of(model), prior_of(model)))


def threshold_of(run: Run, promise: Promise, predictive: Predictive, *, batch_size: int = 8) -> Threshold:
    """The threshold that keeps a promise, from the run's held-out rows by the predictive that will answer.

    Raises:
        UserError: the held-out rows cannot be had.
    """
    rows = held_out_rows(run.record)
    log_probs = log_probabilities(run, rows, predictive, batch_size=batch_size, description="held-out rows")
    return promise.threshold(log_probs, answers(rows))
