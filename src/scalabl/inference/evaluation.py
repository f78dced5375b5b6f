"""A run on data: predictions of every particle, raw and with a temperature, gathered into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from scalabl.core.files import LOG, read_if_whole
from scalabl.data.example import Example, rows_digest
from scalabl.inference.calibration import Calibration
from scalabl.inference.predictor import Predictor, labels_of
from scalabl.inference.promise import Promise, next_step
from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.trained_on import trained_on, trained_on_in_words
from scalabl.metrics.calibration import bounded_temperature, require_rows
from scalabl.metrics.selective import Threshold
from scalabl.metrics.several_labels import wrong_rows
from scalabl.metrics.uncertainty import apply_temperature, mean_particles
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.predictive.base import Predictive
from scalabl.runs.directory import posterior_warnings
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.runs.stock import Asked, is_stock
from scalabl.scoring.base import cut_rows_sentence
from scalabl.scoring.prompted import Prompted


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
    asked: Asked | None = None,
    with_baseline: bool = False,
) -> Report:
    """Evaluate a run directory.

    Args:
        directory: the run.
        rows: labelled rows to test on.
        shifted: rows of other data sets, by name; accuracy is told where all of a set have labels.
        held_out: validation rows to fit a temperature on; none leaves the tempered row out.
        settings: what decides the predictions; a promise, by the score probability, is marked with its threshold from
            the run's own held-out rows.
        data: what `rows` are called.
        batch_size: questions at a time.
        model: the base model, if it has moved.
        asked: how the rows of an adapter without a record are scored.
        with_baseline: predict by the posterior's mean alone too, uncalibrated, where the run has a posterior.

    Raises:
        UserError: not a run, rows that it cannot encode, or fewer held-out rows than a calibration takes.
    """
    if held_out:
        require_rows(len(held_out))
    predictor = Predictor.load(directory, settings, model=model, batch_size=batch_size, asked=asked)
    settings = predictor.resolve(rows)
    run, calibration = predictor.whole_run(), predictor.calibration
    plain = as_learnt(predictor, rows)
    methods = results_of(predictor, plain, rows, shifted)
    if is_stock(run.record) and isinstance(run.scoring, Prompted):  # nobody has told it
        methods[0].notes[:0] = run.scoring.in_words(rows[0])
    if settings.promise is not None and settings.threshold is not None:
        # a curve of several labels is of questions, the threshold of rows
        methods[-1].threshold = settings.threshold if predictor.per_row == 1 else None
        methods[-1].notes.append(_kept(methods[-1], settings.promise, settings.threshold))
        if settings.threshold.abstains:
            methods[-1].notes.append(next_step(run.record, settings.threshold))
    if held_out and not (calibration is not None and calibration.rows_sha256 == rows_digest(held_out, named=True)):
        validation = plain.log_probs(held_out, dataset="temperature")
        methods.append(tempered(methods[0], bounded_temperature(validation, labels_of(held_out))))
    if found := trained_on(run.record, rows):
        for method in methods:
            method.notes.append(f"{trained_on_in_words(found, rows)}, so that figures are too good; evaluate on others")
    recipe, log = run.record.recipe, _log(directory)
    return Report(
        title=f"{recipe['model']} on {data}",
        facts={
            "model": recipe["model"],
            "data": f"{data}, {len(rows):,} rows",
            "trained on": _trained_on(run.record),
            **({"prompt": run.scoring.template.text} if isinstance(run.scoring, Prompted) else {}),
            "seed": str(recipe["seed"]),
            "versions": ", ".join(f"{k} {v}" for k, v in run.record.versions.items()),
            "device": run.record.device,
        },
        methods=methods,
        questions=_questions(rows),
        training={methods[0].name: log} if log else {},
        baseline=_mean_of(predictor, rows, shifted, methods) if with_baseline else None,
        labels=run.record.labels,
    )


def _log(directory: Path) -> list[dict[str, float]]:
    """What the trainer of a run logged; nothing where there is no such file, or it is damaged."""
    entries = read_if_whole(directory / LOG)
    records = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return [{k: v for k, v in entry.items() if type(v) in (int, float)} for entry in records]


def _mean_of(
    predictor: Predictor, rows: Sequence[Example], shifted: Mapping[str, Sequence[Example]], methods: list[MethodResult]
) -> MethodResult | None:
    """The run's own plain LoRA, its posterior's mean, as learnt; None where a method is that already."""
    run = predictor.whole_run()
    if not run.is_sampled or predictor.settings.predictive == "mean":
        return None
    settings = PredictionSettings("mean", raw=True, priors=predictor.settings.priors)
    mean = Predictor(run, settings, batch_size=predictor.batch_size, over_ranks=predictor.over_ranks)
    made = method_result(mean, rows, shifted, methods[0])
    made.notes[:] = ["the baseline: one pass at the posterior's mean, as a plain LoRA answers, uncalibrated"]
    return made


def _trained_on(record: RunRecord) -> str:
    if is_stock(record):
        return record.task["name"]
    steps = f"{record.recipe['steps']} steps" if record.recipe["steps"] else "one pass (Laplace)"
    return f"{record.task['name']}, {record.rows['train']:,} rows, {steps}"


def _questions(rows: Sequence[Example]) -> list[tuple[str, tuple[str, ...]]]:
    """What a report shows of each prediction: its text and its choices; of several labels each one, or not."""
    if rows[0].answers is None:
        return [(row.text, row.choices) for row in rows]
    return [(row.text, (f"not {label}", label)) for row in rows for label in row.choices]


def as_learnt(predictor: Predictor, rows: Sequence[Example]) -> Predictor:
    """The predictor without its run's calibration, resolved for rows; itself where there is none."""
    if predictor.calibration is None:
        return predictor
    plain = predictor.as_learnt()
    plain.resolve(rows)
    return plain


def results_of(
    predictor: Predictor, plain: Predictor, rows: Sequence[Example], shifted: Mapping[str, Sequence[Example]]
) -> list[MethodResult]:
    """A run as rows of a report: as learnt, and by its calibration where it has one; `plain` is of `as_learnt`."""
    methods = [method_result(plain, rows, shifted)]
    methods[0].notes[:0] = [] if plain.settings.why is None else [plain.settings.why]
    if predictor.calibration is not None:
        methods.append(_calibrated(predictor, predictor.calibration, methods[0], rows, shifted))
    return methods


def _calibrated(
    predictor: Predictor,
    calibration: Calibration,
    plain: MethodResult,
    rows: Sequence[Example],
    shifted: Mapping[str, Sequence[Example]],
) -> MethodResult:
    """The row of a report with the run's tau and T; particles that tau leaves as they are are not drawn again."""
    name, temperature = f"{plain.name}, calibrated", predictor.settings.temperature
    settings = predictor.settings
    # priors come behind the temperature
    if settings.scale == 1 and temperature is not None and not settings.is_adaptive and settings.priors is None:
        made = tempered(plain, temperature, name)
    else:
        made = replace(method_result(predictor, rows, shifted, plain), name=name)
    chosen = [] if settings.why is None or settings.why in plain.notes else [settings.why]
    made.notes[:] = [*chosen, calibration.in_words(), *adaptive_notes(made.log_probs, predictor.strategy)]
    if calibration.rows_sha256 == rows_digest(rows, named=True):
        own = "it was fitted on these very rows, so that its figures are too good; evaluate on others"
        made.notes.insert(1 + len(chosen), own)
    return made


def _kept(result: MethodResult, promise: Promise, threshold: Threshold) -> str:
    """What a threshold promises, and what became of it on the rows of the report."""
    given = torch.from_numpy(promise.answered(threshold, result.log_probs, result.per_row))
    wrong = wrong_rows(result.log_probs, result.labels, result.per_row) & given
    found = f"{int(given.sum()):,} of {len(given):,} rows answered, {int(wrong.sum()):,} of them wrong"
    return f"{promise.describe(threshold)}: {found}. {threshold.sentence}"


def method_result(
    predictor: Predictor,
    rows: Sequence[Example],
    shifted: Mapping[str, Sequence[Example]],
    other: MethodResult | None = None,
) -> MethodResult:
    """One row of a report.

    Args:
        predictor: resolved.
        rows: labelled rows.
        shifted: rows of other data sets, by name.
        other: the same run's under another tau, whose pass at the posterior mean is this one's too.
    """
    name = predictor.name
    encoded = predictor.run.encode(list(rows))
    log_probs = predictor.log_probs(rows, encoded, dataset=name)
    known = {of: others for of, others in shifted.items() if all(row.target is not None for row in others)}
    cut = cut_rows_sentence(encoded, predictor.run.scorer.scoring)
    if other is not None:
        of_mean, ood_of_mean = other.of_mean, other.ood_of_mean
    else:
        of_mean = predictor.mean_scores(rows, encoded, dataset="scope") if shifted else {}
        ood_of_mean = {of: predictor.mean_scores(others, dataset=f"scope: {of}") for of, others in shifted.items()}
    return MethodResult(
        name=name,
        log_probs=log_probs,
        labels=labels_of(rows),
        per_row=predictor.per_row,
        ood={of: predictor.log_probs(others, dataset=f"{name}: {of}") for of, others in shifted.items()},
        ood_labels={of: labels_of(others) for of, others in known.items()},
        of_mean=of_mean,
        ood_of_mean=ood_of_mean,
        notes=[
            *([] if cut is None else [cut]),
            *warnings_of_run(predictor.whole_run()),
            *adaptive_notes(log_probs, predictor.strategy),
        ],
    )


def tempered(result: MethodResult, temperature: float, name: str | None = None) -> MethodResult:
    """The same predictions with a temperature, as a row of its own, called "... + T" by default."""
    return MethodResult(
        name=name or f"{result.name} + T",
        log_probs=apply_temperature(result.log_probs, temperature),
        labels=result.labels,
        per_row=result.per_row,
        ood={name: apply_temperature(log_probs, temperature) for name, log_probs in result.ood.items()},
        ood_labels=result.ood_labels,
        of_mean=result.of_mean,
        ood_of_mean=result.ood_of_mean,
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


def warnings_of_run(run: Run) -> list[str]:
    """What is wrong with a posterior, in words; empty for a plain LoRA."""
    return posterior_warnings(run.directory, run.record) if run.is_bayesian and run.directory is not None else []
