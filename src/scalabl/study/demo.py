"""The demo: plain LoRA and ScalaBL trained at the same budget, in and out of distribution. Imports no torch."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import BASELINE
from scalabl.runs.settings import Settings

if TYPE_CHECKING:
    from scalabl.inference.report.results import Report

TASK = "arc-easy"
TRAIN_ROWS = 600
VALIDATION_ROWS = 150
TEST_ROWS = 300
SHIFTED = "mmlu-chemistry"
SHIFTED_ROWS = 100
STEPS = 150
SAMPLES = 10
LAYERS = "last:6"
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def demo_settings(method: str, *, seed: int, steps: int) -> Settings:
    """The same budget for both methods: rows, steps, batch, learning rate, targets, rank."""
    return Settings.flat(
        data=TASK,
        method=method,
        steps=steps,
        seed=seed,
        train_rows=TRAIN_ROWS,
        validation_rows=VALIDATION_ROWS,
        layers=LAYERS,
        target_modules=TARGETS,
        # few steps: sigma needs a rate at which it can arrive, and B a head start before the KL counts in full
        variational_learning_rate=5e-2,
        schedule="warmup",
        kl_warmup=0.5,
        scoring="continuation",
        max_length=256,
    )


def check_demo(output: Path, *, steps: int, test_rows: int, samples: int) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UserError: a number below 1, or a place that cannot be written.
    """
    for name, value in (("--steps", steps), ("--test-rows", test_rows), ("--samples", samples)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    if output.is_file():
        raise UserError(f"{output} is a file; choose another --output.")


def run_demo(
    output: Path, *, seed: int = 0, steps: int = STEPS, test_rows: int = TEST_ROWS, samples: int = SAMPLES
) -> Report:
    """Train both methods and gather their report; what an earlier call finished is not done again.

    Args:
        output: holds the runs `mle-<seed>` and `scalabl-<seed>`.
        seed: of initialisation, order of rows and draws.
        steps: optimiser steps of each method.
        test_rows: how many ARC-Easy test rows.
        samples: N of the Monte Carlo predictive.
    """
    from scalabl.data.assemble import select_rows
    from scalabl.data.load import load_task, rows_of
    from scalabl.inference.evaluation import method_result, tempered
    from scalabl.inference.predictor import Predictor, labels_of
    from scalabl.inference.report.results import MethodResult, Report
    from scalabl.inference.settings import PredictionSettings
    from scalabl.metrics.uncertainty import fit_temperature
    from scalabl.runs.loading import load_run
    from scalabl.training.run import read_log, train

    test = rows_of(TASK, split="test", limit=test_rows)
    shifted = {SHIFTED: rows_of(SHIFTED, split="test", limit=SHIFTED_ROWS)}
    methods: list[MethodResult] = []
    training = {}
    for method in (BASELINE, Settings.method):
        settings = demo_settings(method, seed=seed, steps=steps)
        directory = output / f"{method}-seed{seed}-steps{steps}"
        train(settings, directory)
        run = load_run(directory)
        held_out = select_rows(load_task(TASK), settings.rows).validation
        predictives = ["mean", "mc"] if run.is_bayesian else ["mean"]
        for name in predictives:
            predictor = Predictor(run, PredictionSettings(predictive=name, samples=samples, seed=seed))
            result = method_result(predictor, test, shifted)
            validation = predictor.log_probs(held_out, dataset="temperature")
            methods += [result, tempered(result, fit_temperature(validation, labels_of(held_out)))]
        training[result.name.split(",")[0]] = read_log(directory)
    return Report(
        title="Plain LoRA and ScalaBL at the same budget",
        facts=_facts(run.record, len(test), len(shifted[SHIFTED]), seed, steps) | {"training loss": _losses(training)},
        methods=methods,
        questions=[(row.question, row.choices) for row in test],
        training=training,
    )


def _losses(training: dict[str, list[dict[str, float]]]) -> str:
    """The first and the last logged loss of each run."""
    losses = {name: [entry["loss"] for entry in log if "loss" in entry] for name, log in training.items()}
    return ", ".join(f"{name} {values[0]:.3f} to {values[-1]:.3f}" for name, values in losses.items() if values)


def _facts(record: RunRecord, test_rows: int, shifted: int, seed: int, steps: int) -> dict[str, str]:
    recipe = record.recipe
    nll = ", ".join(f"{name} {value:.3f}" for name, value in record.scoring_nll.items())
    return {
        "model": recipe["model"],
        "data": f"ARC-Easy: {record.rows['train']} training, {record.rows['validation']} validation, "
        f"{test_rows} test rows; shifted: {SHIFTED}, {shifted} rows",
        "scoring": f"{record.scoring_name}, chosen by NLL on validation rows before training ({nll})",
        "adapters": f"r = {recipe['r']}, alpha = {recipe['lora_alpha']:g}, {recipe['target_modules']}, "
        f"{recipe['layers']} of the layers; {record.parameters['lora']:,} LoRA and "
        f"{record.parameters['variational']:,} variational parameters",
        "steps": f"{steps} of {recipe['batch_size']} rows, AdamW {recipe['learning_rate']:g} for both",
        "posterior": f"variational learning rate {recipe['variational_learning_rate']:g}, exact ELBO after a warm-up "
        f"of the KL over {recipe['kl_warmup']:.0%} of the steps, prior N({recipe['prior_mean']:g}, "
        f"{recipe['prior_std']:g}^2)",
        "seed": str(seed),
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items()),
        "device": f"{record.device} ({platform.machine()})",
        "command": f"scalabl demo --seed {seed} --steps {steps} --test-rows {test_rows}",
    }
