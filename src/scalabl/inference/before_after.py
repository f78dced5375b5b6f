"""An adapter before it was made Bayesian and after: the same rows, each as it is and with its temperature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from scalabl.data.example import Example
from scalabl.inference.evaluation import as_learnt, results_of, tempered
from scalabl.inference.predictor import Predictor, labels_of
from scalabl.inference.report.results import MethodResult, Report
from scalabl.inference.report.table import print_table, table
from scalabl.metrics.calibration import bounded_temperature
from scalabl.runs.method import Run
from scalabl.runs.stock import OTHER_PROMPT
from scalabl.scoring.prompted import Prompted

FIGURES = ("accuracy", "nll", "ece")


class BeforeAndAfter:
    """What is told at the end of `scalabl bayesianize`.

    Attributes:
        figures: a row of figures a method, as `scalabl.inference.report.table` gives them; none before `judge`.
        title: on which rows.
    """

    def __init__(self) -> None:
        self.figures: list[dict[str, Any]] = []
        self.title = ""
        self._has_prompt = False

    def judge(self, run: Run, rows: Sequence[Example], before: Tensor, held_out: bool) -> None:
        """Compare a finished run with the adapter that it was made of.

        Args:
            run: with its posterior and, where it has one, its calibration.
            rows: n labelled rows.
            before: (1, n, C) log class probabilities of the adapter itself.
            held_out: whether the posterior was not fitted on the rows.
        """
        try:
            self._compare(run, rows, before, held_out)
        except torch.OutOfMemoryError:  # the run is worth more than its table
            self.title = "before and after: left out, as the device has no memory for it; lower --batch-size"

    def _compare(self, run: Run, rows: Sequence[Example], before: Tensor, held_out: bool) -> None:
        labels = labels_of(rows)
        predictor = Predictor(run, batch_size=run.record.prediction_batch_size, over_ranks=False)
        predictor.resolve(rows)
        plain = MethodResult("plain LoRA", before, labels, per_row=predictor.per_row)
        after = results_of(predictor, as_learnt(predictor, rows), rows, {})
        if len(after) == 1:  # not calibrated: too few rows were held out
            after.append(tempered(after[0], bounded_temperature(after[0].log_probs, labels)))
        for method in after:
            method.notes.clear()  # the run's own warnings are told beside
        methods = [plain, tempered(plain, bounded_temperature(before, labels)), *after]
        methods[1].notes.clear()
        self.figures = table(Report("before and after", {}, methods))
        of = (
            "validation rows"
            if held_out
            else "of the rows that it was fitted on, which flatter it; there are no others"
        )
        self.title = f"before and after, {len(rows):,} {of}; temperatures are fitted on the same rows"
        self._has_prompt = isinstance(run.scoring, Prompted)

    def print(self, console: Console) -> None:
        """The table, and a warning where the adapter itself is at chance."""
        console.print(self.title)
        if not self.figures:
            return
        print_table(self.figures, console, FIGURES)
        if self.figures[0]["collapsed"] and self._has_prompt:
            console.print(OTHER_PROMPT, style="bold yellow")
