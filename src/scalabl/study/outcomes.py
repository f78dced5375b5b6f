"""What a prediction cell comes to on each of its test sets, as it is and with a temperature: its figures, their
resamples, and how well each score of its rows tells errors, or rows out of scope.

OUTPUT/cells/ADDRESS/outcomes.safetensors    kept beside the predictions, so that tables are made anew in seconds
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core.files import writing
from scalabl.inference.report.results import count_choices
from scalabl.metrics import scores as metric_scores
from scalabl.metrics.bootstrap import interval, resamples
from scalabl.metrics.figures import METRICS, evaluate, is_collapsed, ood_auroc
from scalabl.metrics.scores import checked
from scalabl.metrics.uncertainty import apply_temperature, average, decompose, fit_temperature
from scalabl.study.cells import Cell, finished
from scalabl.study.predictions import UNLABELLED, Predictions, read_predictions
from scalabl.study.tested import OUT_OF_SCOPE, TYPOS
from scalabl.study.variants import TEMPERED

OUTCOMES = "outcomes.safetensors"
BOOTSTRAP = 1000
CONFIDENCE = 0.95
ERRORS, MISTYPED, STRANGE = "errors", "errors with typos", "out of scope"
_BINS = 15
_FORMAT = "1"  # raised when what is kept changes its meaning


@dataclass(frozen=True, eq=False)
class Outcome:
    """One entry on one set.

    Attributes:
        method, task: its name, "x+temperature" with one, and the set's.
        labels: (n,), `UNLABELLED` where a row has none.
        figures: columns of the tidy table.
        draws: metric -> (BOOTSTRAP,) its value in each resample of the rows, the same resamples for every method.
        detection: of a tempered outcome, score -> its AUROC for what the set asks: errors, or rows out of scope against
            the task's own.
    """

    method: str
    task: str
    labels: Tensor
    figures: dict[str, Any]
    draws: Mapping[str, Tensor]
    detection: Mapping[str, float | None] = field(default_factory=dict)


@lru_cache(maxsize=4096)
def outcomes(cell: Cell, output: Path, name: str) -> tuple[Outcome, ...]:
    """Raw and tempered outcomes of a finished prediction cell, on each of its test sets; the temperature is fitted on
    the cell's validation rows.

    Args:
        cell, output: which.
        name: of the method, in the outcomes.

    Raises:
        UserError: its predictions are missing or were altered.
    """
    path = cell.directory(output) / OUTCOMES
    done = finished(output, cell.address)
    made = {"format": _FORMAT, "of": done["sha256"] if done else ""}
    known = _read(path, made)
    if known is None:
        known = _computed(cell, read_predictions(cell, output))
        with suppress(OSError):  # a place that is only read: computed again next time
            _write(path, known, made)
    return tuple(replace(outcome, method=name + outcome.method) for outcome in known)


def resampled(probs: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Metric -> (BOOTSTRAP,) its value in each resample of the rows, which are those of this seed and so many rows.

    Args:
        probs: (n, C), averaged over particles.
        labels: (n,).
        seed: of the resamples.
    """
    rows, counts = metric_scores.Rows(*checked(probs, labels), _BINS), resamples(len(labels), BOOTSTRAP, seed)
    return {name: torch.cat([getattr(metric_scores, name)(rows, each) for each in counts]) for name in METRICS}


def scores(log_probs: Tensor) -> dict[str, Tensor]:
    """Each score of the rows, (n,) float64; of one particle those that need none other.

    From particles' class probabilities p_n of a row and their average p:

        probability     1 - max_c p_c
        entropy         H[p]; its parts are `aleatoric`, the mean of H[p_n], and `epistemic`, the mutual information
        pairwise KL     the mean of KL(p_m || p_n) over pairs of particles
        logits          variance over particles of log p_n, without its mean over classes, on average over classes
        answer          variance over particles of the log probability of the answer
        disagreement    the share of particles with another answer than p's

    Args:
        log_probs: (N, n, C) log class probabilities of N particles.
    """
    each = log_probs.double()
    probs, parts = average(each), decompose(each)
    found = {"probability": 1 - probs.max(dim=1).values, "entropy": parts.total}
    count = len(each)
    if count < 2:
        return found
    logs = each.clamp_min(-100.0)
    own = (logs.exp() * logs).sum(dim=-1).mean(dim=0)
    crossed = (logs.exp().mean(dim=0) * logs.mean(dim=0)).sum(dim=-1)
    answer = probs.argmax(dim=1)
    of_answer = logs.gather(2, answer.expand(count, -1)[..., None]).squeeze(-1)
    return found | {
        "aleatoric": parts.aleatoric,
        "epistemic": parts.epistemic,
        "pairwise KL": (own - crossed) * count / (count - 1),
        "logits": (logs - logs.mean(dim=-1, keepdim=True)).var(dim=0).mean(dim=-1),
        "answer": of_answer.var(dim=0),
        "disagreement": (each.argmax(dim=-1) != answer).double().mean(dim=0),
    }


def told(what: Mapping[str, Any]) -> str:
    """What the scores of a set's rows are asked to tell."""
    return STRANGE if OUT_OF_SCOPE in what else MISTYPED if TYPOS in what else ERRORS


def _computed(cell: Cell, predictions: Predictions) -> list[Outcome]:
    """Outcomes of a method without a name."""
    sets = cell.settings["test_sets"]
    # sets of the same rows, mistyped or not, and cells that were tested on them share their resamples
    seed = int(sets[cell.settings["task"]]["sha256"][:8], 16) if sets else 0
    tuned = evaluate(average(predictions.validation[0]), predictions.validation[1], bootstrap=1)["nll"].value
    found: list[Outcome] = []
    for end, t in (("", None), (TEMPERED, fit_temperature(*predictions.validation))):
        known: dict[str, Tensor] = {}
        for task, (raw, labels) in predictions.tests.items():
            log_probs = raw if t is None else apply_temperature(raw, t)
            probs, own = average(log_probs), scores(log_probs)
            draws = {} if (labels == UNLABELLED).all() else resampled(probs, labels, seed)
            figures = _figures(probs, labels, log_probs, draws)
            figures |= {"validation_nll": tuned if t is None else None, "temperature": t}
            known = known or own  # the task's own rows come first
            if known is not own:
                figures["ood_auroc_total"] = _auroc(known["entropy"], own["entropy"])
                figures["ood_auroc"] = _auroc(known["epistemic"], own["epistemic"]) if "epistemic" in own else None
            wrong = probs.argmax(dim=1) != labels
            strange = told(sets[task]) == STRANGE
            sides = {s: (known[s], x) if strange else (x[~wrong], x[wrong]) for s, x in own.items()}
            detection = {} if t is None else {s: _auroc(*pair) for s, pair in sides.items() if min(map(len, pair))}
            found.append(Outcome(end, task, labels, figures, draws, detection))
    return found


def _auroc(inside: Tensor, outside: Tensor) -> float | None:
    return ood_auroc(inside, outside, bootstrap=1).value


def _figures(probs: Tensor, labels: Tensor, log_probs: Tensor, draws: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is measured on one set; of one out of scope, whose rows have no label, none of the metrics."""
    counts = {"n": len(labels), "particles": log_probs.shape[0]}
    if not draws:
        return dict.fromkeys(METRICS) | {"collapsed": False, "why": None} | counts
    figures = {name: metric.value for name, metric in evaluate(probs, labels, bootstrap=1).items()}
    accuracy = interval(cast(float, figures["accuracy"]), draws["accuracy"], CONFIDENCE, (0, 1))
    why = is_collapsed(accuracy, labels, count_choices(log_probs))
    return {**figures, "collapsed": why is not None, "why": why, **counts}


def _write(path: Path, known: list[Outcome], made: Mapping[str, str]) -> None:
    tensors: dict[str, Tensor] = {}
    facts = []
    for i, each in enumerate(known):
        tensors |= {f"{i}|{name}": draw for name, draw in each.draws.items()} | {f"{i}|labels": each.labels.clone()}
        facts.append([each.method, each.task, each.figures, each.detection])
    with writing(path) as unfinished:
        save_file(tensors, unfinished, {**made, "outcomes": json.dumps(facts)})


def _read(path: Path, made: Mapping[str, str]) -> list[Outcome] | None:
    """What was kept; None where there is nothing, or it is of other predictions or of another format."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        if any(facts.get(key) != value for key, value in made.items()):
            return None
        tensors = load_file(path)
        known = []
        for i, (method, task, figures, detection) in enumerate(json.loads(facts["outcomes"])):
            draws = {name: tensors[f"{i}|{name}"] for name in METRICS if f"{i}|{name}" in tensors}
            known.append(Outcome(method, task, tensors[f"{i}|labels"], figures, draws, detection))
        return known
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
