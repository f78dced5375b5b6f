"""Fitting a run's calibration: at the end of a training, or on new rows where it is deployed (`scalabl calibrate`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.data.example import Example, rows_digest
from scalabl.inference.calibration import Calibration
from scalabl.inference.predictor import Predictor, kind_of, labels_of, log_probabilities
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.trained_on import trained_on, trained_on_in_words
from scalabl.metrics.calibration import (
    ROWS_NEEDED,
    CalibrationFit,
    bounded_temperature,
    fit_calibration,
    require_rows,
    tempered_losses,
)
from scalabl.predictive.auto import AutoPredictive, with_scale
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.runs.card import write_cards
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord


def fit_run(
    run: Run, rows: Sequence[Example], settings: PredictionSettings | None = None, *, batch_size: int = 8
) -> Calibration:
    """tau and T of the predictive that settings name, by default the one that is taken for these rows; and T of the
    others that a default prediction may take. Several processes share the work.

    Which one auto takes depends on tau. Where it is linearised at tau = 1 and the tau that suits it is so large that
    auto would take particles under it, tau is that of particles.

    Args:
        run: a run that can predict, finished or about to be.
        rows: labelled rows that it was not trained on.
        settings: predictive, samples and seed.
        batch_size: rows at a time.

    Raises:
        UserError: fewer than `ROWS_NEEDED` rows, or rows that the run cannot encode.
    """
    require_rows(len(rows))
    settings = replace(settings or PredictionSettings(), raw=True)
    predictor = Predictor(run, settings, batch_size=batch_size)
    auto = predictor.strategy
    predictor.resolve(rows)
    strategy, labels, encoded = predictor.strategy, labels_of(rows), run.encode(list(rows))

    def predicted(strategy: Predictive, what: str) -> Tensor:
        log_probs = log_probabilities(
            run, rows, strategy, batch_size=batch_size, description=f"calibrating, {what}", encoded=encoded
        )
        return run.scorer.scoring.likelihood.questions(log_probs)

    def fitted(strategy: Predictive) -> CalibrationFit:
        if isinstance(strategy, LinearizedPredictive):
            strategy = strategy.keeping()  # every tau scales the same Gaussians

        def at(scale: float) -> Tensor:
            scaled = MeanPredictive() if scale == 0 else with_scale(strategy, scale)
            return predicted(scaled, f"{kind_of(strategy)}, tau = {scale:.3g}")

        return fit_calibration(at, labels, has_scale=getattr(strategy, "has_scale", False), per_row=predictor.per_row)

    fit = fitted(strategy)
    if isinstance(auto, AutoPredictive) and isinstance(strategy, LinearizedPredictive) and fit.scale not in (0, 1):
        under_tau = Predictor(run, replace(settings, scale=fit.scale), batch_size=batch_size)
        under_tau.resolve(rows)
        if kind_of(under_tau.strategy) == "mc":
            strategy = MonteCarloPredictive(auto.samples, seed=auto.seed, stochastic_layers=auto.stochastic_layers)
            fit = fitted(strategy)
    kind = kind_of(strategy)
    temperatures = {kind: fit.temperature}
    if kind != "mean":
        known = fit.tried.get(0.0)
        temperatures["mean"] = known[0] if known else bounded_temperature(predicted(MeanPredictive(), "mean"), labels)
    for other in _others(auto, kind, settings):
        with contextlib.suppress(torch.OutOfMemoryError):
            scaled = MeanPredictive() if fit.scale == 0 else with_scale(other, fit.scale)
            temperature, losses = tempered_losses(predicted(scaled, kind_of(other)), labels)
            if fit.scale not in (0, 1):
                _, as_learnt = tempered_losses(predicted(other, "tau = 1"), labels)
                if losses.mean() > as_learnt.mean():
                    continue  # tau is another predictive's, and does not suit this one
            temperatures[kind_of(other)] = temperature
    return Calibration(
        scale=fit.scale,
        temperatures=temperatures,
        predictive=kind,
        samples=settings.samples,
        seed=settings.seed,
        rows=len(rows),
        rows_sha256=rows_digest(rows, named=True),
        nll={"before": fit.before, "after": fit.after},
        accuracy=fit.accuracy,
    )


def _others(strategy: Predictive, kind: str, settings: PredictionSettings) -> list[Predictive]:
    """What auto may take beside the predictive that it has taken for these rows: particles, for a few rows; linearised
    ones where they do not cost more. Of a run that predicts linearised, the particles that `export` writes."""
    if isinstance(strategy, LinearizedPredictive):
        return [MonteCarloPredictive(settings.samples, seed=settings.seed)]
    if not isinstance(strategy, AutoPredictive):
        return []
    costs = processes.on_main(lambda: {} if strategy.choice is None else dict(strategy.choice.costs))
    if kind != "mc":
        return [MonteCarloPredictive(strategy.samples, seed=strategy.seed)]
    cheap = costs.get("linearized", torch.inf) <= costs.get(f"mc, N = {strategy.samples}", 0)
    return [LinearizedPredictive(seed=strategy.seed)] if cheap else []


def calibration_at_the_end(run: Run, rows: Sequence[Example]) -> dict[str, object] | None:
    """What the record of a run gets at the end of its training: None where its held-out rows are too few, or a device
    has no memory left for predictions."""
    if len(rows) < ROWS_NEEDED:
        return None
    try:
        return fit_run(run, rows, batch_size=run.record.prediction_batch_size).as_dict()
    except torch.OutOfMemoryError:
        return None


def calibrate(
    directory: Path,
    rows: Sequence[Example],
    settings: PredictionSettings | None = None,
    *,
    batch_size: int = 8,
    model: str | None = None,
) -> tuple[Calibration | None, Calibration]:
    """Fit a finished run's calibration on rows and write it into its record, in the place of the one that it has.

    Args:
        directory: the run's.
        rows: labelled rows of where it is deployed; those that it was trained on are left out, where they are known.
        settings: predictive, samples and seed.
        batch_size: rows at a time.
        model: the base model, if it has moved.

    Returns:
        the calibration that it had, and the one that it has now.

    Raises:
        UserError: not a finished run, too few rows that it was not trained on, rows that it cannot encode.
    """
    require_rows(len(rows))
    found = trained_on(RunRecord.read(directory), rows)
    left_out = set(found)
    others = [row for row in rows if row not in left_out]
    if found and len(others) < ROWS_NEEDED:
        raise UserError(
            f"{trained_on_in_words(found, rows)}, and {len(others)} others are too few to calibrate on, it takes "
            f"{ROWS_NEEDED}; give rows that it was not trained on."
        )
    run = load_run(directory, model=model)
    before, made = Calibration.of(run.record), fit_run(run, others, settings, batch_size=batch_size)
    record = replace(run.record, calibration=made.as_dict())
    write_cards(directory, record)
    record.write(directory)
    return before, made
