"""The demos: methods at the same budget on a real model and real rows, in and out of scope, as one report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scalabl.core.console import quiet
from scalabl.core.workers import side_by_side
from scalabl.data.assemble import select_rows
from scalabl.data.example import Example
from scalabl.data.load import load_task, rows_of, shifted_rows
from scalabl.inference.calibrate import calibration_at_the_end
from scalabl.inference.evaluation import as_learnt, method_result, results_of, tempered
from scalabl.inference.predictor import Predictor, labels_of
from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.uncertainty import fit_temperature
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import BASELINE
from scalabl.runs.settings import ALL_LINEAR, Settings
from scalabl.study.demos import DEMOS, LANGUAGE, ROUTING, SAMPLES, demo_settings
from scalabl.training.run import read_log, train

MEMBERS = 3  # of the ensemble


def run_demo(
    output: Path,
    *,
    task: str = ROUTING,
    seed: int = 0,
    steps: int | None = None,
    test_rows: int | None = None,
    samples: int = SAMPLES,
    workers: int = 1,
) -> Report:
    """Train every method and gather their report; what an earlier call finished is not trained again.

    Args:
        output: holds the runs.
        task: which demo.
        seed: of initialisation, order of rows and draws.
        steps: optimiser steps of each method; None for the demo's own.
        test_rows: how many rows it is tested on; None for the demo's own.
        samples: N of the Monte Carlo predictives.
        workers: processes that share the runs.

    Raises:
        KeyboardInterrupt: Ctrl-C; the same call goes on from the checkpoints.
    """
    demo = DEMOS[task]
    steps, test_rows = steps or demo.steps, test_rows or demo.test_rows

    def part(method: str, seed: int, member: bool = False) -> _Part:
        return _Part(task, method, seed, steps, test_rows, samples, output, member)

    own = [part(method, seed) for method in demo.methods]
    members = [part(BASELINE, seed + 1000 * i, True) for i in range(1, MEMBERS)] if task == ROUTING else []
    parts = [*own[1:], own[0], *members]  # MC dropout takes longest, plain LoRA least
    found = dict(zip(parts, side_by_side(_do, parts, workers=workers), strict=True))
    results = [result for each in own for result in found[each].results]
    lead, training = len(results) - 1, {found[each].results[-1].name.split(",")[0]: found[each].log for each in own}
    rows = _rows(own[0])
    if members:
        passes = [found[each].passes for each in (own[0], *members)]
        results += _ensemble(found[own[0]].results[0], [each for each in passes if each is not None], rows.held_out)
    return Report(
        title=_TITLES[task],
        facts=_facts(task, found[own[-1]].record, rows, seed, steps) | {"training loss": _losses(training)},
        methods=results,
        questions=[(row.text, row.choices) for row in rows.test],
        training=training,
        lead=lead,
    )


@dataclass(frozen=True)
class _Part:
    """A run of a demo, trained and tested; of a member beside the first of an ensemble nothing else is wanted."""

    task: str
    method: str
    seed: int
    steps: int
    test_rows: int
    samples: int
    output: Path
    member: bool


@dataclass(frozen=True)
class _Passes:
    """Log probabilities (1, n, C) of an ensemble's member, as learnt."""

    test: Tensor
    shifted: dict[str, Tensor]
    held_out: Tensor


@dataclass(frozen=True)
class _Done:
    """What there is of a run: its rows of the report, and what an ensemble averages."""

    results: list[MethodResult]
    passes: _Passes | None
    log: list[dict[str, float]]
    record: RunRecord


@dataclass(frozen=True)
class _Rows:
    test: list[Example]
    shifted: dict[str, list[Example]]
    held_out: tuple[Example, ...]


def _rows(part: _Part) -> _Rows:
    demo, known = DEMOS[part.task], load_task(part.task)
    return _Rows(
        test=rows_of(part.task, split="test", limit=part.test_rows),
        shifted={demo.shifted: shifted_rows(demo.shifted, limit=demo.shifted_rows, labels=known.labels)},
        held_out=select_rows(known, _settings(part).rows).validation,
    )


def _settings(part: _Part) -> Settings:
    return demo_settings(part.task, part.method, seed=part.seed, steps=part.steps)


def _do(part: _Part) -> _Done:
    """Train a run and predict with it; a worker's work."""
    quiet()
    directory = part.output / f"{part.method}-seed{part.seed}-steps{part.steps}"
    # an ensemble's average, and every predictive of the language demo, has a temperature of its own, fitted below
    calibrate = calibration_at_the_end if part.task == ROUTING and not part.member else None
    record = train(_settings(part), directory, calibrate=calibrate)
    results, passes = (_routing if part.task == ROUTING else _language)(directory, _rows(part), part)
    return _Done(results, passes, read_log(directory), record)


_TITLES = {
    ROUTING: "Routing questions to 20 subjects, and telling which belong to none",
    LANGUAGE: "Plain LoRA and ScalaBL at the same budget",
}


def _routing(directory: Path, rows: _Rows, part: _Part) -> tuple[list[MethodResult], _Passes | None]:
    """A run as learnt and calibrated, by the predictive that is everybody's default."""
    predictor = Predictor.load(directory, PredictionSettings(samples=part.samples, seed=part.seed))
    predictor.resolve(rows.test)
    plain = as_learnt(predictor, rows.test)
    if part.member:
        shifted = {of: plain.log_probs(others, dataset=of) for of, others in rows.shifted.items()}
        return [], _Passes(plain.log_probs(rows.test, dataset="test"), shifted, _held_out(plain, rows))
    results = results_of(predictor, plain, rows.test, rows.shifted)
    if part.method != BASELINE:
        return results, None
    return results, _Passes(results[0].log_probs, results[0].ood, _held_out(plain, rows))


def _held_out(predictor: Predictor, rows: _Rows) -> Tensor:
    return predictor.log_probs(rows.held_out, dataset="temperature")


def _language(directory: Path, rows: _Rows, part: _Part) -> tuple[list[MethodResult], _Passes | None]:
    """A run by its mean and by N particles, each without and with a temperature of its own."""
    run = load_run(directory)
    made = []
    for name in ["mean", "mc"] if run.is_bayesian else ["mean"]:
        predictor = Predictor(run, PredictionSettings(predictive=name, samples=part.samples, seed=part.seed))
        made.append(method_result(predictor, rows.test, rows.shifted))
        made.append(tempered(made[-1], fit_temperature(_held_out(predictor, rows), labels_of(rows.held_out))))
    return made, None


def _ensemble(first: MethodResult, members: Sequence[_Passes], held_out: Sequence[Example]) -> list[MethodResult]:
    """M runs of other seeds, averaged [Lakshminarayanan et al. 2017], and with a temperature of their average."""
    made = replace(
        first,
        name=f"ensemble of {len(members)}",
        log_probs=torch.cat([member.test for member in members]),
        ood={other: torch.cat([member.shifted[other] for member in members]) for other in first.ood},
        notes=[f"{len(members)} plain LoRAs, trained and run: {len(members)} times the cost"],
    )
    log_probs = torch.cat([member.held_out for member in members])
    return [made, tempered(made, fit_temperature(log_probs, labels_of(held_out)))]


def _losses(training: dict[str, list[dict[str, float]]]) -> str:
    """The first and the last logged loss of each run."""
    losses = {name: [entry["loss"] for entry in log if "loss" in entry] for name, log in training.items()}
    return ", ".join(f"{name} {values[0]:.3f} to {values[-1]:.3f}" for name, values in losses.items() if values)


def _facts(task: str, record: RunRecord, rows: _Rows, seed: int, steps: int) -> dict[str, str]:
    recipe, demo = record.recipe, DEMOS[task]
    nll = ", ".join(f"{name} {value:.3f}" for name, value in record.scoring_nll.items())
    chosen = f", chosen by NLL on validation rows before training ({nll})" if len(record.scoring_nll) > 1 else ""
    # an encoder's default
    targets = ALL_LINEAR if task == ROUTING else recipe["target_modules"]
    schedule = f" after a warm-up of the KL over {recipe['kl_warmup']:.0%} of the steps"
    return {
        "model": recipe["model"],
        "data": f"{task}: {record.rows['train']} training, {record.rows['validation']} validation, "
        f"{len(rows.test)} test rows; shifted: {demo.shifted}, {len(rows.shifted[demo.shifted])} rows",
        "scoring": f"{record.scoring_name}{chosen}",
        "adapters": f"r = {recipe['r']}, alpha = {recipe['lora_alpha']:g}, {targets}, "
        f"{recipe['layers']} of the layers; {record.parameters['lora']:,} LoRA and "
        f"{record.parameters['variational']:,} variational parameters",
        "steps": f"{steps} of {recipe['batch_size']} rows, AdamW {recipe['learning_rate']:g} for all",
        "posterior": f"variational learning rate {recipe['variational_learning_rate']:g}, exact ELBO"
        f"{schedule if recipe['schedule'] == 'warmup' else ''}, prior N({recipe['prior_mean']:g}, "
        f"{recipe['prior_std']:g}^2)",
        "seed": str(seed),
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items()),
        "device": f"{record.device} ({platform.machine()})",
        "command": f"scalabl demo --task {task} --seed {seed} --steps {steps} --test-rows {len(rows.test)}",
    }
