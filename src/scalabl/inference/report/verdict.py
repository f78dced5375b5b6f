"""What a report comes to in a few sentences, and how undecided a pure guess is on its rows."""

import math
from typing import Any

from scalabl.inference.report.results import MethodResult, Report, count_choices
from scalabl.inference.report.table import in_words, number, span
from scalabl.metrics.uncertainty import average

_SAME = 0.01  # of confidence and accuracy: less is told by no report
_SAME_NLL = 5e-4  # nats: what three digits do not show
_WELL, _SOMEWHAT = 0.8, 0.65  # AUROC


def in_short(report: Report, rows: list[dict[str, Any]]) -> str:
    """How often the leading method is right, whether it is as sure as it may be, and what it gains on the first one.

    Args:
        report: with its methods.
        rows: what `table(report)` gave.
    """
    i = range(len(rows))[report.lead]
    row, method = rows[i], report.methods[i]
    if row["collapsed"]:
        return f"{row['method']}: {row['collapsed']}"
    of = f"{number(row['accuracy']['value'], 'accuracy')} % of {in_words(row)}"
    chance = count_choices(method.log_probs).double().reciprocal().mean().item()
    said = [f"{row['method']} is right on {of}, where guessing is right on {number(chance, 'accuracy')} %"]
    said[0] += f", and {_how_sure(method, row)}."
    area = row["auroc"]["value"]
    if area is not None:
        told = "well" if area >= _WELL else "somewhat" if area >= _SOMEWHAT else "hardly"
        said.append(f"Its confidence {told} tells right answers from wrong ones (AUROC {number(area, 'auroc')}).")
    if i:
        said.append(_against(rows[0]["method"], row["versus_first"]["nll"]))
    return " ".join(said)


def _how_sure(method: MethodResult, row: dict[str, Any]) -> str:
    confidence = average(method.log_probs).amax(dim=1).mean().item()
    gap, ece = confidence - row["accuracy"]["value"], f"ECE {number(row['ece']['value'], 'ece')} %"
    says = f"it says {number(confidence, 'accuracy')} % on average"
    if abs(gap) < _SAME:
        return f"{says}, as it should ({ece})"
    return f"{says}, {number(abs(gap), 'ece')} points {'too sure' if gap > 0 else 'not sure enough'} ({ece})"


def _against(first: str, difference: dict[str, Any]) -> str:
    value, low, high = difference["value"], difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return f"These rows do not tell its NLL from that of {first}."
    if abs(value) < _SAME_NLL:
        return f"Its NLL is that of {first}, to three digits."
    by = f"{number(abs(value), 'nll')} nats (difference {span(difference, 'nll', signed=True)})"
    return f"Its NLL is {'lower' if value < 0 else 'higher'} than that of {first} by {by}."


def pure_guess(method: MethodResult) -> str:
    """The entropy of a guess on the rows at hand: "1.10 for 3 choices"."""
    if method.per_row > 1:
        return f"{method.per_row * math.log(2):.2f} for {method.per_row} labels, each yes or no"
    choices = count_choices(method.log_probs)
    fewest, most = int(choices.min()), int(choices.max())
    if fewest == most:
        return f"{math.log(most):.2f} for {most} choices"
    return f"{math.log(fewest):.2f} to {math.log(most):.2f} for {fewest} to {most} choices"
