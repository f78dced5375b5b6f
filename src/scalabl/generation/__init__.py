"""Open-ended answers: text from the average over particles, and a confidence that predicts whether it is wrong."""

from scalabl.generation.answer_span import answer_span
from scalabl.generation.calibration import choose_confidence, fit_confidence, left_out
from scalabl.generation.clusters import equivalence, semantic_sets
from scalabl.generation.confidence import Confidence
from scalabl.generation.correctness import MEASURES, answer_text, correctness, normalise_answer
from scalabl.generation.decoding import Decoded, decode
from scalabl.generation.fan_out import averaged
from scalabl.generation.ranking import judge_confidence, judge_ranking, paired_ranking_difference, rejection_curve
from scalabl.generation.sampled_scores import SAMPLED_SCORES, sampled_scores
from scalabl.generation.score import Score
from scalabl.generation.sequence_scores import SEQUENCE_SCORES, sequence_scores
from scalabl.generation.token_figures import TokenFigures, token_figures

SCORES: dict[str, Score] = SEQUENCE_SCORES | SAMPLED_SCORES
"""Every score of an answer, by name."""

__all__ = [
    "MEASURES",
    "SAMPLED_SCORES",
    "SCORES",
    "SEQUENCE_SCORES",
    "Confidence",
    "Decoded",
    "Score",
    "TokenFigures",
    "answer_span",
    "answer_text",
    "averaged",
    "choose_confidence",
    "correctness",
    "decode",
    "equivalence",
    "fit_confidence",
    "judge_confidence",
    "judge_ranking",
    "left_out",
    "normalise_answer",
    "paired_ranking_difference",
    "rejection_curve",
    "sampled_scores",
    "semantic_sets",
    "sequence_scores",
    "token_figures",
]
