"""Open questions judged: how often a run is right, and how well each score tells when it is not, at its cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalabl.core.errors import UserError
from scalabl.data.open_questions import OpenQuestion
from scalabl.generation.answer import GeneratedAnswer
from scalabl.generation.confidence import AnswerSettings, Confidence, choose_confidence
from scalabl.generation.correctness import MEASURES, correctness
from scalabl.generation.decoding import Decoded
from scalabl.generation.fan_out import Draws
from scalabl.generation.generate import AnswerSampling, answer_settings, answers_with_samples, draws_of
from scalabl.generation.scores import SAMPLED_SCORES, SEQUENCE_SCORES, Score
from scalabl.metrics.bootstrap import Metric
from scalabl.metrics.ranking import judge_confidence, judge_ranking, rejection_curve
from scalabl.runs.method import Run

SCORES: dict[str, Score] = {**SEQUENCE_SCORES, **SAMPLED_SCORES}
# what the text's tokens had, how open their places were, and what the particles disagree about
TOGETHER = (
    "log_probability", "mean_log_probability", "min_log_probability", "first_token_entropy", "mean_aleatoric",
    "mean_epistemic",
)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Answers to n questions, and how right they are.

    Attributes:
        questions, answers: n each.
        right: (n,) correctness by the measure, 0 to 1.
        f1: (n,) token F1.
        answer_tokens: generated for the answers themselves, in all.
        sampled_tokens: generated for the further answers, in all.
        made: how the answers were made.
    """

    questions: Sequence[OpenQuestion]
    answers: Sequence[GeneratedAnswer]
    right: NDArray[np.float64]
    f1: NDArray[np.float64]
    answer_tokens: int
    sampled_tokens: int
    made: AnswerSettings | None = None

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Name -> (n,) values of every score that the answers have."""
        return {name: np.array([answer.scores[name] for answer in self.answers]) for name in self.answers[0].scores}


def answer_questions(
    run: Run,
    questions: Sequence[OpenQuestion],
    *,
    samples: int = 10,
    seed: int = 0,
    max_new_tokens: int = 32,
    sampling: AnswerSampling | None = None,
    measure: str = "exact_match",
    chat: bool | None = None,
    batch_size: int = 8,
    advance: Callable[[int], None] | None = None,
    draws: Draws | None = None,
    seen: Callable[[Decoded, list[Decoded]], None] | None = None,
) -> Judged:
    """Answer questions greedily with the average over particles, and compare the answers with those that count.

    Args:
        run: a finished run.
        questions: at least one.
        samples: N particles; 0 is the mean.
        seed: of the particles and of sampled answers.
        max_new_tokens: of an answer.
        sampling: further answers, for the scores that need them.
        measure: of `correctness.MEASURES`.
        chat: put questions into the model's chat template; None is what the run was trained with.
        batch_size: questions at a time.
        advance: called with the number of questions done.
        draws: other particles than those of the run's method (`EnsembleDraws`).
        seen: called with each decoded answer and its further ones.

    Raises:
        UserError: no question, no such measure, an answer that it cannot read, a model that generates NaN.
    """
    if not questions:
        raise UserError("There is no question to answer; give at least one row.")
    if measure not in MEASURES:
        raise UserError(f"There is no measure {measure!r} of an answer; choose one of {', '.join(MEASURES)}.")
    for row in questions:  # an answer that the measure cannot read is refused before any is generated
        correctness("", row.answers, measure)
    stop = () if measure == "number" else ("\n",)
    answers: list[GeneratedAnswer] = []
    answer_tokens = sampled_tokens = 0
    particles = draws or draws_of(run, samples, seed)
    for answer, decoded, others in answers_with_samples(
        run, [row.prompt for row in questions], particles, seed=seed, chat=chat, stop=stop,
        sampling=sampling or AnswerSampling(), max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance,
    ):  # fmt: skip
        answers.append(answer)
        answer_tokens += len(decoded.token_ids)
        sampled_tokens += sum(len(other.token_ids) for other in others)
        if seen is not None:
            seen(decoded, others)

    def right(by: str) -> NDArray[np.float64]:
        pairs = zip(answers, questions, strict=True)
        return np.array([correctness(answer.text, row.answers, by, stops=stop) for answer, row in pairs])

    made = answer_settings(run, particles, chat=chat, stop=stop)
    return Judged(questions, answers, right(measure), right("f1"), answer_tokens, sampled_tokens, made)


def fit_on(judged: Judged, names: Sequence[str] | None = None) -> Confidence:
    """The confidence of the lowest left-out NLL on validation answers, from scores that one decode gives.

    Each score by itself, and the logistic regression on those of `TOGETHER`.

    Args:
        judged: validation answers.
        names: the scores to choose from; all of one decode if None.

    Raises:
        UserError: too few of them, or too few right or wrong ones.
    """
    scores = judged.scores()
    chosen = names if names is not None else [name for name in scores if not SCORES[name].sampled]
    chosen = [name for name in chosen if np.ptp(scores[name]) > 0]  # the same for every answer says nothing
    directions = {name: SCORES[name].higher_is_uncertain for name in chosen}
    several = tuple(name for name in TOGETHER if name in chosen)
    together = [several] if len(several) > 1 else []
    fitted, _ = choose_confidence({name: scores[name] for name in chosen}, judged.right, directions, together=together)
    return replace(fitted, made=judged.made)


def judge(judged: Judged, fitted: Confidence | None, *, seed: int = 0) -> dict[str, Any]:
    """Every figure of an evaluation, as plain values.

    Args:
        judged: test answers.
        fitted: the confidence that was fitted on validation answers.
        seed: of the bootstrap.

    Returns:
        n, accuracy, f1, tokens and, by score, auroc, prr, aurc (each {value, low, high}) and decodes; the confidence's
        own ece, brier and nll; the risk-coverage curve of its ranking.
    """
    scores, n = judged.scores(), len(judged.answers)
    per_answer = (judged.answer_tokens / n, judged.sampled_tokens / n)
    found: dict[str, Any] = {
        "n": n,
        "accuracy": float(judged.right.mean()),
        "f1": float(judged.f1.mean()),
        "tokens_an_answer": per_answer[0],
        "scores": {},
    }
    for name, values in scores.items():
        score = SCORES[name]
        figures = judge_ranking(score.uncertainty(values), judged.right, seed=seed)
        cost = per_answer[0] + (per_answer[1] if score.sampled else 0.0)
        found["scores"][name] = {**plain(figures), "tokens": cost}
    if fitted is not None:
        confidence = fitted(scores)
        found["confidence"] = {"kind": fitted.kind, "scores": list(fitted.scores), "fitted_on": fitted.rows}
        found["confidence"] |= plain(judge_confidence(confidence, judged.right, seed=seed))
        found["confidence"] |= plain(judge_ranking(-confidence, judged.right, seed=seed))
        coverage, risk = rejection_curve(-confidence, judged.right)
        found["curve"] = {"coverage": coverage.tolist(), "risk": risk.tolist()}
    return found


def plain(figures: Mapping[str, Metric]) -> dict[str, Any]:
    """Metrics as plain values, for JSON."""
    return {name: {"value": m.value, "low": m.low, "high": m.high, "reason": m.reason} for name, m in figures.items()}
