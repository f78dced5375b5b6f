"""How particles are drawn, and when a row has enough of them: the settings, checked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from scalabl.core.errors import UserError

PREDICTIVES = ("mean", "mc", "linearized", "auto")
DRAWS = ("independent", "antithetic", "sobol", "moments")  # `scalabl.posterior.draws` says what each one is


@dataclass(frozen=True)
class Sampling:
    """Settings of a Monte Carlo predictive beside its number of particles and its seed.

    Args:
        draws: one of DRAWS.
        confidence: stop drawing for a row when its answer equals that of all N particles with at least this
            probability; 1 never stops early, None is no adaptive N at all.
        threshold: the answer is the most probable choice, or none where its probability is below this.

    Raises:
        UserError: a value that is none of these, or adaptive N with draws that depend on each other.
    """

    draws: str = "independent"
    confidence: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.draws not in DRAWS:
            raise UserError(f"There are no {self.draws!r} draws; choose one of {', '.join(DRAWS)}.")
        if self.confidence is not None and not 0 < self.confidence <= 1:
            raise UserError(f"The confidence is {self.confidence}; it must be above 0 and at most 1, 0.95 is usual.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"The abstention threshold is {self.threshold}; it must be between 0 and 1.")
        if self.confidence is not None and self.draws != "independent":
            raise UserError(
                f"Adaptive N needs independent draws, but these are {self.draws}: its confidence would not hold; "
                "leave out one of the two."
            )

    @property
    def is_plain(self) -> bool:
        """Whether these are N independent draws for every row."""
        return self.draws == "independent" and self.confidence is None


PLAIN = Sampling()
