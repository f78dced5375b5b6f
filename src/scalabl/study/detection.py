"""Which number tells a wrong answer, and which a row out of scope: the AUROC of each score of a prediction.

From particles' class probabilities p_n of a row and their average p, all with the method's temperature:

    probability     1 - max_c p_c
    entropy         H[p]; its parts are `aleatoric`, the mean of H[p_n], and `epistemic`, the mutual information
    pairwise KL     the mean of KL(p_m || p_n) over pairs of particles
    logits          variance over particles of log p_n, without its mean over classes, on average over classes
    answer          variance over particles of the log probability of the answer
    disagreement    the share of particles with another answer than p's

detection.csv has a row for each of them, entry and set: of errors among labelled rows, or of rows out of scope against
the task's own test rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from scalabl.inference.report.table import number
from scalabl.metrics.figures import ood_auroc
from scalabl.metrics.uncertainty import apply_temperature, average, decompose, fit_temperature
from scalabl.study.cells import finished
from scalabl.study.page import PageCell, PageTable
from scalabl.study.plan import StudyPlan
from scalabl.study.tested import OUT_OF_SCOPE, TYPOS
from scalabl.study.work import read_predictions

ERRORS, MISTYPED, STRANGE = "errors", "errors with typos", "out of scope"


def scores(log_probs: Tensor) -> dict[str, Tensor]:
    """Each score of the rows, (n,) float64; of one particle those that need none other.

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


def detection_rows(plan: StudyPlan, output: Path) -> list[dict[str, Any]]:
    """The rows of detection.csv, of every finished entry in the plan's order."""
    rows = []
    for entry in plan.entries:
        if finished(output, entry.prediction) is None:
            continue
        cell = plan.cells[entry.prediction]
        predictions = read_predictions(cell, output)
        temperature = fit_temperature(*predictions.validation)
        known: dict[str, Tensor] = {}
        for name, (raw, labels) in predictions.tests.items():
            what = cell.settings["test_sets"][name]
            log_probs = apply_temperature(raw, temperature)
            found = scores(log_probs)
            known = known or found  # the task's own rows come first
            kind = STRANGE if OUT_OF_SCOPE in what else MISTYPED if TYPOS in what else ERRORS
            wrong = average(log_probs).argmax(dim=1) != labels
            for score, values in found.items():
                sides = (known[score], values) if kind == STRANGE else (values[~wrong], values[wrong])
                if min(map(len, sides)):
                    rows.append(
                        {
                            "method": entry.variant.name, "task": entry.task, "set": name, "tells": kind,
                            "score": score, "seed": entry.seeds[0], "auroc": ood_auroc(*sides, bootstrap=1).value,
                        }
                    )  # fmt: skip
    return rows


def detection_tables(rows: Sequence[dict[str, Any]]) -> list[PageTable]:
    """A table for each method: mean AUROC over sets, seeds and tasks, and of how many tasks."""
    kinds, tables = (ERRORS, MISTYPED, STRANGE), []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        tasks = dict.fromkeys(row["task"] for row in own)
        means = {
            (score, kind): fmean(values)
            for score in dict.fromkeys(row["score"] for row in own)
            for kind in kinds
            if (values := [row["auroc"] for row in own if (row["score"], row["tells"]) == (score, kind)])
        }
        best = {kind: max((v for (_, k), v in means.items() if k == kind), default=None) for kind in kinds}
        lines = []
        for score in dict.fromkeys(score for score, _ in means):
            values = [means.get((score, kind)) for kind in kinds]
            cells = [
                PageCell(
                    "–" if value is None else number(value, "auroc"), bold=value is not None and value == best[kind]
                )
                for kind, value in zip(kinds, values, strict=True)
            ]
            lines.append((score, cells))
        caption = f"{method} + T: AUROC of each score, mean over {len(tasks)} task{'s' if len(tasks) > 1 else ''}"
        tables.append(PageTable(caption, ("score", *kinds), lines, folded=True))
    return tables
