"""The demos: methods at the same budget on a real model and real rows, in and out of scope, as one report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

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
from scalabl.runs.settings import ALL_LINEAR
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
) -> Report:
    """Train every method and gather their report; what an earlier call finished is not done again.

    Args:
        output: holds the runs.
        task: which demo.
        seed: of initialisation, order of rows and draws.
        steps: optimiser steps of each method; None for the demo's own.
        test_rows: how many rows it is tested on; None for the demo's own.
        samples: N of the Monte Carlo predictives.
    """
    demo = DEMOS[task]
    steps, test_rows = steps or demo.steps, test_rows or demo.test_rows
    known = load_task(task)
    rows = _Rows(
        test=rows_of(task, split="test", limit=test_rows),
        shifted={demo.shifted: shifted_rows(demo.shifted, limit=demo.shifted_rows, labels=known.labels)},
        held_out=select_rows(known, demo_settings(task, BASELINE, seed=seed, steps=steps).rows).validation,
    )

    def trained(method: str, seed: int) -> Path:
        directory = output / f"{method}-seed{seed}-steps{steps}"
        # in the language demo every predictive has a temperature of its own, fitted below
        calibrate = calibration_at_the_end if task == ROUTING else None
        train(demo_settings(task, method, seed=seed, steps=steps), directory, calibrate=calibrate)
        return directory

    results: list[MethodResult] = []
    training = {}
    for method in demo.methods:
        directory = trained(method, seed)
        results += (_routing if task == ROUTING else _language)(directory, rows, samples, seed)
        training[results[-1].name.split(",")[0]] = read_log(directory)
    record, lead = RunRecord.read(directory), len(results) - 1
    if task == ROUTING:
        members = [trained(BASELINE, seed + 1000 * i) for i in range(MEMBERS)]
        results += _ensemble(results[0], members, rows)
    return Report(
        title=_TITLES[task],
        facts=_facts(task, record, rows, seed, steps) | {"training loss": _losses(training)},
        methods=results,
        questions=[(row.text, row.choices) for row in rows.test],
        training=training,
        lead=lead,
    )


@dataclass(frozen=True)
class _Rows:
    test: list[Example]
    shifted: dict[str, list[Example]]
    held_out: tuple[Example, ...]


_TITLES = {
    ROUTING: "Routing questions to 20 subjects, and telling which belong to none",
    LANGUAGE: "Plain LoRA and ScalaBL at the same budget",
}


def _routing(directory: Path, rows: _Rows, samples: int, seed: int) -> list[MethodResult]:
    """A run as learnt and calibrated, by the predictive that is everybody's default."""
    predictor = Predictor.load(directory, PredictionSettings(samples=samples, seed=seed))
    return results_of(predictor, as_learnt(predictor, rows.test), rows.test, rows.shifted)


def _language(directory: Path, rows: _Rows, samples: int, seed: int) -> list[MethodResult]:
    """A run by its mean and by N particles, each without and with a temperature of its own."""
    run = load_run(directory)
    made = []
    for name in ["mean", "mc"] if run.is_bayesian else ["mean"]:
        predictor = Predictor(run, PredictionSettings(predictive=name, samples=samples, seed=seed))
        made.append(method_result(predictor, rows.test, rows.shifted))
        held_out = predictor.log_probs(rows.held_out, dataset="temperature")
        made.append(tempered(made[-1], fit_temperature(held_out, labels_of(rows.held_out))))
    return made


def _ensemble(first: MethodResult, directories: Sequence[Path], rows: _Rows) -> list[MethodResult]:
    """M runs of other seeds, averaged [Lakshminarayanan et al. 2017], and with a temperature of their average; `first`
    is the first one's raw predictions."""
    name, held_out = f"ensemble of {len(directories)}", []
    test, shifted = [first.log_probs], {other: [log_probs] for other, log_probs in first.ood.items()}
    for i, directory in enumerate(directories):
        predictor = Predictor.load(directory, PredictionSettings(raw=True))
        held_out.append(predictor.log_probs(rows.held_out, dataset="temperature"))
        if i > 0:
            test.append(predictor.log_probs(rows.test, dataset=name))
            for other, others in rows.shifted.items():
                shifted[other].append(predictor.log_probs(others, dataset=f"{name}: {other}"))
    made = replace(
        first,
        name=name,
        log_probs=torch.cat(test),
        ood={other: torch.cat(log_probs) for other, log_probs in shifted.items()},
        notes=[f"{len(directories)} plain LoRAs, trained and run: {len(directories)} times the cost"],
    )
    return [made, tempered(made, fit_temperature(torch.cat(held_out), labels_of(rows.held_out)))]


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
