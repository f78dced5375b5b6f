"""What a report is made from.

The rows worth reading: the surest mistakes and the least sure hits of a method.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.inference.scope import scope_scores
from scalabl.metrics.selective import Threshold
from scalabl.metrics.uncertainty import Uncertainty, average, decompose


@dataclass
class MethodResult:
    """The predictions of one method: one row of the table.

    Attributes:
        name: as it is printed, "ScalaBL, N = 10".
        log_probs: (N, n, C) log-probabilities of N particles; -inf for choices a row lacks, and for particles that
            adaptive N did not draw for it.
        labels: (n,) indices of the right choices; the same rows for every method of a report.
        ood: name of a shifted data set -> (N, m, C') log-probabilities; may be empty.
        ood_labels: name of a shifted data set -> (m,) labels; a set without labels gets no accuracy.
        notes: remarks to print under the row ("temperature 1.56").
        of_mean: scores of one pass at the posterior mean, energy and distance, (n,) each, higher is further out of
            scope; may be empty.
        ood_of_mean: name of a shifted data set -> the same of its rows, (m,) each.
        threshold: of the highest probability, chosen on held-out rows for a promised error rate.
        per_row: how many predictions behind each other are of one row, which may have several of so many labels: the
            answers to the question whether it has a label, (N, n per_row, 2), 0 for no and 1 for yes.
    """

    name: str
    log_probs: Tensor
    labels: Tensor
    ood: dict[str, Tensor] = field(default_factory=dict)
    ood_labels: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    threshold: Threshold | None = None
    of_mean: dict[str, Tensor] = field(default_factory=dict)
    ood_of_mean: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    per_row: int = 1

    def uncertainty(self, other: str | None = None) -> Uncertainty:
        """That of the rows (n,), or of a shifted set's (m,)."""
        return decompose(self.log_probs if other is None else self.ood[other], self.per_row)

    def scope_scores(self, other: str | None = None) -> dict[str, Tensor]:
        """Every score of scope that there is of the rows (n,), or of a shifted set's (m,); higher is further out."""
        log_probs = self.log_probs if other is None else self.ood[other]
        of_mean = self.of_mean if other is None else self.ood_of_mean.get(other, {})
        scores = scope_scores(log_probs, of_mean, self.per_row)
        return {name: torch.from_numpy(values) for name, values in scores.items()}

    @property
    def num_labels(self) -> int:
        """The labels that the rows share, where they do."""
        return self.log_probs.shape[2] if self.per_row == 1 else self.per_row

    def num_choices(self) -> Tensor:
        """(n,) how many choices each row has."""
        return count_choices(self.log_probs)


@dataclass
class Report:
    """Everything a report shows.

    Attributes:
        title: the heading.
        facts: model, data, seeds, steps, versions, device, command ...: name -> text.
        methods: the rows of the table; the first one is what the others are compared with.
        questions: (question, choices) of the n predictions, or empty: then no questions are shown.
        labels: the C labels that all rows share, for figures of each; None for questions with choices of their own.
        training: name of a run -> its logged records (step; nll or loss, kl, sigma_mean, s_mean).
        lead: which method stands on top beside the first; the last by default.
        baseline: what the page compares the methods with, where it is none of them.
    """

    title: str
    facts: dict[str, str]
    methods: list[MethodResult]
    questions: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    lead: int = -1
    baseline: MethodResult | None = None

    def with_baseline(self) -> "Report":
        """The same with its baseline as the first method."""
        if self.baseline is None:
            return self
        return replace(self, methods=[self.baseline, *self.methods], baseline=None)

    def check(self) -> None:
        """Raises UserError unless there are methods, with distinct names, on the same rows."""
        if not self.methods:
            raise UserError("there is nothing to report; pass the predictions of at least one method.")
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise UserError(f"two methods have the same name ({', '.join(names)}); give each its own.")
        first = self.methods[0]
        for method in self.methods:
            if not torch.equal(method.labels.cpu(), first.labels.cpu()):
                raise UserError(
                    f"{method.name!r} and {first.name!r} were not evaluated on the same rows; evaluate all "
                    "methods of a report on one data set."
                )
        if self.questions and len(self.questions) != len(first.labels):
            raise UserError(
                f"there are {len(self.questions)} questions but {len(first.labels)} predictions; pass one "
                "question for each row, or none."
            )
        if self.labels is not None and any(m.num_labels != len(self.labels) for m in self.methods):
            raise UserError(f"there are {len(self.labels)} labels, but predictions for other numbers; pass their own.")
        width = min(method.log_probs.shape[2] for method in self.methods)
        for row, (_, choices) in enumerate(self.questions):
            if len(choices) > width:
                raise UserError(
                    f"row {row} has {len(choices)} choices but predictions for {width}; pass the same rows."
                )


def count_choices(log_probs: Tensor) -> Tensor:
    """log_probs (N, n, C) -> (n,) how many choices each row has (those not -inf for every particle)."""
    return (log_probs > -torch.inf).any(dim=0).sum(dim=-1)


@dataclass(frozen=True)
class ChosenAnswer:
    """One choice of an example with the probability the method gives it."""

    text: str
    prob: float
    right: bool
    chosen: bool


@dataclass(frozen=True)
class Shown:
    """One example with the method's answer; entropies in nats, `epistemic` None for a single prediction."""

    row: int
    question: str
    choices: list[ChosenAnswer]
    confidence: float
    entropy: float
    epistemic: float | None


def notable(
    method: MethodResult, questions: list[tuple[str, tuple[str, ...]]], count: int = 4
) -> tuple[list[Shown], list[Shown]]:
    """Up to `count` wrong answers of the highest confidence, and right answers of the lowest."""
    probs = average(method.log_probs)
    confidence, answer = probs.max(dim=1)
    correct = answer == method.labels.cpu()
    order = confidence.argsort(descending=True, stable=True)
    wrong, right = order[~correct[order]][:count], order[correct[order]].flip(0)[:count]
    parts = decompose(method.log_probs[:, torch.cat([wrong, right])])
    epistemic = parts.epistemic.tolist() if method.log_probs.shape[0] > 1 else [None] * len(parts.total)
    shown = []
    for i, row in enumerate(torch.cat([wrong, right]).tolist()):
        question, texts = questions[row]
        choices = [
            ChosenAnswer(text, probs[row, c].item(), c == int(method.labels[row]), c == int(answer[row]))
            for c, text in enumerate(texts)
        ]
        entropy = parts.total[i].item()
        shown.append(Shown(row, question, choices, confidence[row].item(), entropy, epistemic[i]))
    return shown[: len(wrong)], shown[len(wrong) :]
