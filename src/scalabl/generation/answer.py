"""An answer: a text, how likely it is to be right, the scores behind that, and figures for every token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scalabl.generation.decoding import Decoded


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        text: what it adds to the text.
        probability: of the token under the average over particles.
        total, aleatoric, epistemic: nats, of the distribution that it was taken from.
    """

    text: str
    probability: float
    total: float
    aleatoric: float
    epistemic: float


@dataclass(frozen=True)
class Answer:
    """What `scalabl.generate` gives for a prompt.

    Attributes:
        prompt: what was asked.
        text: the answer.
        confidence: in [0, 1]; a probability of being right where `calibrated`, else the length-normalised
            probability of the text, exp(1/T sum_t log p(y_t)).
        calibrated: whether the confidence was fitted on validation rows.
        scores: name -> value; which direction means unsure is in `sequence_scores`.
        tokens: figures for every token.
        finished: whether the text ended by itself, rather than at the limit of tokens.
    """

    prompt: str
    text: str
    confidence: float
    calibrated: bool
    scores: dict[str, float]
    tokens: tuple[Token, ...]
    finished: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def tokens_of(decoded: Decoded) -> tuple[Token, ...]:
    """The tokens of a decoded text with their figures."""
    figures = (decoded.average_log_probs.exp(), decoded.total, decoded.aleatoric, decoded.epistemic)
    columns = [values.tolist() for values in figures]
    return tuple(Token(text, *row) for text, *row in zip(decoded.tokens, *columns, strict=True))
