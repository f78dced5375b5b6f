"""A run on data: predictions of every particle, raw and with a temperature, gathered into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scalabl.data.example import Example
from scalabl.inference.predictor import Predictor, labels_of
from scalabl.inference.promise import Promise
from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.selective import Threshold
from scalabl.metrics.uncertainty import apply_temperature, average, fit_temperature, mean_particles
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.predictive.base import Predictive
from scalabl.runs.method import Run
from scalabl.scoring.base import cut_rows_sentence
from scalabl.tuner.diagnostics import summarize, warnings_of, weights_of
from scalabl.tuner.layers import prior_of


def evaluate_run(
    directory: Path,
    rows: Sequence[Example],
    shifted: Mapping[str, Sequence[Example]],
    held_out: Sequence[Example],
    settings: PredictionSettings | None = None,
    *,
    data: str,
    batch_size: int = 8,
    model: str | None = None,
) -> Report:
    """Evaluate a run directory.

    Args:
        directory: the run.
        rows: labelled rows to test on.
        shifted: labelled rows of other data sets, by name.
        held_out: validation rows to fit a temperature on; none leaves the tempered row out.
        settings: what decides the predictions; a promise, by the score probability, is marked with its threshold from
            the run's own held-out rows.
        data: what `rows` are called.
        batch_size: questions at a time.
        model: the base model, if it has moved.
    """
    predictor = Predictor.load(directory, settings, model=model, batch_size=batch_size)
    settings = predictor.resolve(rows)
    run = predictor.whole_run()
    result = method_result(predictor, rows, shifted)
    result.notes[:0] = [] if settings.why is None else [settings.why]
    if settings.promise is not None and settings.threshold is not None:
        result.threshold = settings.threshold
        result.notes.append(_kept(result, settings.promise, settings.threshold))
    methods = [result]
    if held_out:
        validation = predictor.log_probs(held_out, dataset="temperature")
        methods.append(tempered(result, fit_temperature(validation, labels_of(held_out))))
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
        questions=[(row.text, row.choices) for row in rows],
    )


def _kept(result: MethodResult, promise: Promise, threshold: Threshold) -> str:
    """What a threshold promises, and what became of it on the rows of the report."""
    given = torch.from_numpy(promise.answered(threshold, result.log_probs))
    wrong = (average(result.log_probs).argmax(dim=1) != result.labels) & given
    found = f"{int(given.sum()):,} of {len(given):,} rows answered, {int(wrong.sum()):,} of them wrong"
    return f"{promise.describe(threshold)}: {found}. {threshold.sentence}"


def method_result(
    predictor: Predictor, rows: Sequence[Example], shifted: Mapping[str, Sequence[Example]]
) -> MethodResult:
    """One row of a report."""
    name = predictor.name
    encoded = predictor.run.encode(list(rows))
    log_probs = predictor.log_probs(rows, encoded, dataset=name)
    cut = cut_rows_sentence(encoded, predictor.run.scorer.scoring)
    return MethodResult(
        name=name,
        log_probs=log_probs,
        labels=labels_of(rows),
        ood={other: predictor.log_probs(others, dataset=f"{name}: {other}") for other, others in shifted.items()},
        ood_labels={other: labels_of(others) for other, others in shifted.items()},
        notes=[
            *([] if cut is None else [cut]),
            *posterior_warnings(predictor.whole_run()),
            *adaptive_notes(log_probs, predictor.strategy),
        ],
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
        f"{mean_particles(log_probs):.1f} of at most {log_probs.shape[0]} particles a row on average; the answer is "
        f"that of all with confidence {predictive.confidence:g} (t bound)"
    ]


def posterior_warnings(run: Run) -> list[str]:
    """What is wrong with a posterior, in words; empty for a plain LoRA."""
    if not run.is_bayesian:
        return []
    model = run.scorer.model
    return run.record.warnings + warnings_of(summarize(weights_of(model), prior_of(model)))
