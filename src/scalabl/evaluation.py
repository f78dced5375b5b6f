"""A run on data: predictions of every particle, raw and with a temperature, gathered into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scalabl.diagnostics import summarize, warnings_of, weights_of
from scalabl.loading import Run, load_run
from scalabl.methods import load_method
from scalabl.methods.temperature import apply_temperature, fit_temperature
from scalabl.predictive import Predictive, predict
from scalabl.progress import progress_bar
from scalabl.report import MethodResult, Report
from scalabl.tasks import Example
from scalabl.trunk_store import with_stored_trunk
from scalabl.tuner import prior_of


def log_probabilities(
    run: Run, rows: Sequence[Example], predictive: Predictive, *, batch_size: int = 8, description: str = "predicting"
) -> Tensor:
    """(N, n, C) log class probabilities, with a progress bar.

    Raises:
        UserError: rows that the run's scoring cannot encode.
    """
    encoded = with_stored_trunk(run.scorer, run.encode(list(rows)), batch_size=batch_size)
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
    batch_size: int = 8,
    model: str | None = None,
) -> Report:
    """Evaluate a run directory.

    Args:
        directory: the run.
        rows: labelled rows to test on.
        shifted: labelled rows of other data sets, by name.
        held_out: validation rows to fit a temperature on; none leaves the tempered row out.
        data: what `rows` are called.
        predictive: "mean" or "mc"; None takes mc where there is a posterior.
        samples: N of mc.
        seed: of the particles.
        batch_size: questions at a time.
        model: the base model, if it has moved.
    """
    run = load_run(directory, model=model)
    strategy = run.predictive(predictive or default_predictive(run), samples=samples, seed=seed)
    result = method_result(run, describe_method(run, strategy), rows, shifted, strategy, batch_size=batch_size)
    methods = [result]
    if held_out:
        validation = log_probabilities(run, held_out, strategy, batch_size=batch_size, description="temperature")
        methods.append(tempered(result, fit_temperature(validation, answers(held_out))))
    recipe = run.record["recipe"]
    return Report(
        title=f"{recipe['model']} on {data}",
        facts={
            "model": recipe["model"],
            "data": f"{data}, {len(rows):,} rows",
            "trained on": f"{run.record['task']['name']}, {run.record['rows']['train']:,} rows, "
            f"{recipe['steps']} steps",
            "seed": str(recipe["seed"]),
            "versions": ", ".join(f"{k} {v}" for k, v in run.record["versions"].items()),
            "device": run.record["device"],
        },
        methods=methods,
        questions=[(row.question, row.choices) for row in rows],
    )


def default_predictive(run: Run) -> str:
    """mc where the method averages over particles."""
    return "mc" if run.is_sampled else "mean"


def describe_method(run: Run, predictive: Predictive) -> str:
    """As in a table: "plain LoRA", "MAP", "ScalaBL, mean", "ScalaBL, N = 10"."""
    method = run.record["recipe"]["method"]
    if method == "mle":
        return "plain LoRA"
    title = load_method(method).TITLE
    if not run.is_sampled:
        return title
    number = getattr(predictive, "samples", None)
    return f"{title}, {predictive.name if number is None else f'N = {number}'}"


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
    return MethodResult(
        name=name,
        log_probs=log_probabilities(run, rows, predictive, batch_size=batch_size, description=name),
        labels=answers(rows),
        ood={
            other: log_probabilities(run, others, predictive, batch_size=batch_size, description=f"{name}: {other}")
            for other, others in shifted.items()
        },
        ood_labels={other: answers(others) for other, others in shifted.items()},
        notes=posterior_warnings(run),
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


def posterior_warnings(run: Run) -> list[str]:
    """What is wrong with a posterior, in words; empty for a plain LoRA."""
    if not run.is_bayesian:
        return []
    prior = prior_of(run.scorer.model)
    return run.record.get("warnings", []) + warnings_of(summarize(weights_of(run.scorer.model), prior), prior)
