"""What a score of an answer is: a number, which way it points, and how many decodes it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        function: of one `Decoded`; of sampled scores (answer, samples, sets), as `sampled_scores` says.
        higher_is_uncertain: which way it points.
        sampled: whether it needs samples beside the answer.
        particles: whether it takes two particles or more: with one it is the same for every answer.
    """

    function: Callable[..., float]
    higher_is_uncertain: bool
    sampled: bool = False
    particles: bool = False

    def decodes(self, samples: int) -> int:
        """How many texts are generated for it, the answer itself being one: 1, or 1 + samples."""
        return 1 + samples if self.sampled else 1

    def uncertainty(self, value: Any) -> Any:
        """A value, or an array of them, turned so that higher is less sure."""
        return value if self.higher_is_uncertain else -value
