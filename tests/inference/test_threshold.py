"""A threshold for a promised error rate on the risk-coverage picture."""

import math
import re

import torch

from scalabl.inference.report.figures import risk_coverage_curves
from scalabl.metrics.selective import Threshold


def threshold(above: float) -> Threshold:
    return Threshold(above=above, max_error=0.1, rows=50, answered=10, wrong=1, sentence="as promised")


def label(svg: str) -> str:
    found = re.search(r'aria-label="([^"]*)"', svg)
    assert found is not None
    return found[1]


def test_a_threshold_is_marked_where_it_meets_its_curve() -> None:
    # 40 rows, surer and surer; the 10 least sure and one of the surest are wrong
    confidence = torch.linspace(0.55, 0.94, 40)
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    labels = (torch.arange(40) < 10).long()
    labels[35] = 1
    methods = [("one", probs, labels), ("two", probs, labels)]
    plain = risk_coverage_curves("risk", methods)
    marked = risk_coverage_curves("risk", methods, [None, threshold(confidence[19].item())])
    assert "threshold" not in plain and marked.count('id="risk-threshold_1"') == 1
    assert "risk-threshold_0" not in marked
    said = "two at its threshold: 50% answered, 5.0% of them wrong, at most 10.0% promised."
    assert label(marked) == f"{label(plain)} {said}"
    # nothing answered: no disc, but the level is there
    nothing = risk_coverage_curves("risk", methods, [threshold(math.inf), None])
    assert "risk-threshold" not in nothing
    assert label(nothing).endswith("one at its threshold: 0% answered, at most 10.0% promised.")
    assert len(nothing) > len(plain)
