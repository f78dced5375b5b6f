"""Numbers about predictions: tensors in, figures with their bootstrap intervals out."""

from scalabl.metrics.bootstrap import Metric
from scalabl.metrics.collapse import is_collapsed
from scalabl.metrics.curves import Bin, reliability, risk_coverage
from scalabl.metrics.evaluate import METRICS, evaluate, ood_auroc, paired_difference, paired_ood_difference

__all__ = [
    "METRICS",
    "Bin",
    "Metric",
    "evaluate",
    "is_collapsed",
    "ood_auroc",
    "paired_difference",
    "paired_ood_difference",
    "reliability",
    "risk_coverage",
]
