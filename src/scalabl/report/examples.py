"""The rows worth reading: the surest mistakes and the least sure hits of a method."""

from dataclasses import dataclass

import torch

from scalabl.report.results import MethodResult
from scalabl.uncertainty import average, decompose


@dataclass(frozen=True)
class Choice:
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
    choices: list[Choice]
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
            Choice(text, probs[row, c].item(), c == int(method.labels[row]), c == int(answer[row]))
            for c, text in enumerate(texts)
        ]
        entropy = parts.total[i].item()
        shown.append(Shown(row, question, choices, confidence[row].item(), entropy, epistemic[i]))
    return shown[: len(wrong)], shown[len(wrong) :]
