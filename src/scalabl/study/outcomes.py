"""What a prediction cell comes to on each of its test sets, as it is and with a temperature: its figures, the losses of
its rows with their resamples, and how well each score of its rows tells errors, or rows out of scope.

OUTPUT/cells/ADDRESS/outcomes.safetensors    kept beside the predictions, so that tables are made anew in seconds

Losses are in half precision, 7 bytes a row, so that a study's results can hold them (`kept.py`); figures are of the
whole numbers, and only intervals are of the halves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core.files import writing
from scalabl.inference.report.results import count_choices
from scalabl.metrics import scores as metric_scores
from scalabl.metrics.bootstrap import interval, resamples
from scalabl.metrics.figures import METRICS, evaluate, is_collapsed, ood_auroc
from scalabl.metrics.scores import checked
from scalabl.metrics.uncertainty import apply_temperature, average, decompose, fit_temperature
from scalabl.study.cells import FACTS, OUTCOMES, OUTCOMES_FORMAT, Cell, finished, outcome_facts
from scalabl.study.predictions import UNLABELLED, Predictions, read_predictions
from scalabl.study.tested import OUT_OF_SCOPE, TYPOS
from scalabl.study.variants import TEMPERED

BOOTSTRAP = 1000
CONFIDENCE = 0.95
ERRORS, MISTYPED, STRANGE = "errors", "errors with typos", "out of scope"
LOSSES = ("nll", "surprise", "brier", "right")
_BINS = 15
_DRAWN = "resampled "


@dataclass(frozen=True, eq=False)
class Outcome:
    """One entry on one set.

    Attributes:
        method, task: its name, "x+temperature" with one, and the set's.
        rows: digest of the rows.
        figures: columns of the tidy table.
        losses: (n,) each of `losses_of`; nothing where the rows have no labels.
        draws: metric -> (BOOTSTRAP,) its value in each resample of the rows, the same resamples for every method.
        detection: of a tempered outcome, score -> its AUROC for what the set asks: errors, or rows out of scope against
            the task's own.
    """

    method: str
    task: str
    rows: str
    figures: dict[str, Any]
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    draws: Mapping[str, Tensor] = field(default_factory=dict)
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
    path, done = cell.directory(output) / OUTCOMES, finished(output, cell.address)
    of = done["sha256"] if done else ""
    known = read_outcomes(path, of)
    if known is None:
        known = _computed(cell, read_predictions(cell, output))
    if any(each.losses and not each.draws for each in known):
        seed = _seed(cell)
        known = [replace(each, draws=resampled(rows_of(each.losses), seed) if each.losses else {}) for each in known]
        with suppress(OSError):  # a place that is only read: computed again next time
            write_outcomes(path, known, of)
    return tuple(replace(outcome, method=name + outcome.method) for outcome in known)


def losses_of(rows: metric_scores.Rows) -> dict[str, Tensor]:
    """What the metrics need of the rows, (n,) each in half precision: -log of the label's probability and of the
    answer's (`surprise`), Brier's sum, and whether the answer is `right`.

    A logarithm keeps its digits near a probability of one, where most answers are.
    """
    halves = {"nll": rows.nll, "surprise": -rows.confidence.log(), "brier": rows.brier}
    return {name: value.half() for name, value in halves.items()} | {"right": rows.correct.bool()}


def rows_of(losses: Mapping[str, Tensor]) -> metric_scores.Rows:
    """`losses_of` and back, but for half of the digits."""
    nll, surprise, brier = (losses[name].double() for name in ("nll", "surprise", "brier"))
    return metric_scores.Rows((-surprise).exp(), losses["right"].double(), nll, brier, _BINS)


def resampled(rows: metric_scores.Rows, seed: int) -> dict[str, Tensor]:
    """Metric -> (BOOTSTRAP,) its value in each resample of the rows, which are those of this seed and so many rows."""
    counts = resamples(len(rows.nll), BOOTSTRAP, seed)
    return {name: torch.cat([getattr(metric_scores, name)(rows, each) for each in counts]) for name in METRICS}


def _seed(cell: Cell) -> int:
    """Of the resamples: one for all sets of the same rows, mistyped or not, and all cells that were tested on them."""
    sets = cell.settings["test_sets"]
    return int(sets[cell.settings["task"]]["sha256"][:8], 16) if sets else 0


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
    """Outcomes of a method without a name, without resamples."""
    sets = cell.settings["test_sets"]
    tuned = evaluate(average(predictions.validation[0]), predictions.validation[1], bootstrap=1)["nll"].value
    found: list[Outcome] = []
    for end, t in (("", None), (TEMPERED, fit_temperature(*predictions.validation))):
        known: dict[str, Tensor] = {}
        for task, (raw, labels) in predictions.tests.items():
            log_probs = raw if t is None else apply_temperature(raw, t)
            probs, own = average(log_probs), scores(log_probs)
            judged = None if (labels == UNLABELLED).all() else metric_scores.Rows.of(*checked(probs, labels), _BINS)
            figures = _figures(probs, labels, log_probs, judged) if judged else dict.fromkeys(METRICS) | _UNJUDGED
            figures |= {"n": len(labels), "particles": log_probs.shape[0]}
            figures |= {"validation_nll": tuned if t is None else None, "temperature": t}
            known = known or own  # the task's own rows come first
            if known is not own:
                figures["ood_auroc_total"] = _auroc(known["entropy"], own["entropy"])
                figures["ood_auroc"] = _auroc(known["epistemic"], own["epistemic"]) if "epistemic" in own else None
            losses = losses_of(judged) if judged else {}
            wrong = probs.argmax(dim=1) != labels
            strange = told(sets[task]) == STRANGE
            sides = {s: (known[s], x) if strange else (x[~wrong], x[wrong]) for s, x in own.items()}
            detection = {} if t is None else {s: _auroc(*pair) for s, pair in sides.items() if min(map(len, pair))}
            found.append(Outcome(end, task, sets[task]["sha256"], figures, losses, {}, detection))
    return found


def _auroc(inside: Tensor, outside: Tensor) -> float | None:
    return ood_auroc(inside, outside, bootstrap=1).value


_UNJUDGED = {"collapsed": False, "why": None}


def _figures(probs: Tensor, labels: Tensor, log_probs: Tensor, rows: metric_scores.Rows) -> dict[str, Any]:
    figures = {name: metric.value for name, metric in evaluate(probs, labels, bootstrap=1).items()}
    counts = resamples(len(labels), BOOTSTRAP, 0)
    draws = torch.cat([metric_scores.accuracy(rows, each) for each in counts])
    why = is_collapsed(
        interval(rows.correct.mean().item(), draws, CONFIDENCE, (0, 1)), labels, count_choices(log_probs)
    )
    return figures | {"collapsed": why is not None, "why": why}


def write_outcomes(path: Path, known: Sequence[Outcome], of: str, **facts: Any) -> None:
    """Outcomes of a method without a name as one file, whole or not at all; the same ones are the same bytes.

    Args:
        path: where.
        known: the outcomes; draws that they lack are lacking in the file.
        of: digest of the predictions.
        facts: plain values that stand beside them.
    """
    tensors: dict[str, Tensor] = {}
    for i, each in enumerate(known):
        tensors |= {f"{i}|{name}": value.clone() for name, value in (*each.losses.items(), *_named(each.draws))}
    sets = [[each.method, each.task, each.rows, each.figures, each.detection] for each in known]
    with writing(path) as unfinished:
        # one entry: safetensors puts several into an order of its own each time
        save_file(
            tensors, unfinished, {FACTS: json.dumps({"format": OUTCOMES_FORMAT, "of": of, "sets": sets, **facts})}
        )


def read_outcomes(path: Path, of: str) -> list[Outcome] | None:
    """What `write_outcomes` wrote; None where there is nothing, or it is of other predictions or another format."""
    facts = outcome_facts(path)
    if facts.get("of") != of:
        return None
    try:
        tensors, known = load_file(path), []
        for i, (method, task, rows, figures, detection) in enumerate(facts["sets"]):
            losses = {name: tensors[f"{i}|{name}"] for name in LOSSES if f"{i}|{name}" in tensors}
            draws = {name: tensors[f"{i}|{_DRAWN}{name}"] for name in METRICS if f"{i}|{_DRAWN}{name}" in tensors}
            known.append(Outcome(method, task, rows, figures, losses, draws, detection))
        return known
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _named(draws: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(_DRAWN + name, draw) for name, draw in draws.items()]
