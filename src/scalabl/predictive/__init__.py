"""How a posterior becomes predictions: one interface, one strategy a file.

A predictive takes a scorer and a batch and returns log class probabilities (N, B, C) of its N particles.
"""

from scalabl.predictive.auto import AutoPredictive
from scalabl.predictive.base import Predictive, predict
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.predictive.mean import MeanPredictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive

PREDICTIVES = ("mean", "mc", "linearized", "auto")


def make_predictive(name: str, *, samples: int = 10, seed: int = 0) -> Predictive:
    """The predictive of that name."""
    from scalabl.errors import UserError

    if name == "mean":
        return MeanPredictive()
    if name == "mc":
        return MonteCarloPredictive(samples, seed=seed)
    if name == "linearized":
        return LinearizedPredictive(seed=seed)
    if name == "auto":
        return AutoPredictive(samples, seed=seed)
    raise UserError(f"There is no predictive {name!r}; choose one of {', '.join(PREDICTIVES)}.")


__all__ = [
    "PREDICTIVES",
    "AutoPredictive",
    "LinearizedPredictive",
    "MeanPredictive",
    "MonteCarloPredictive",
    "Predictive",
    "make_predictive",
    "predict",
]
