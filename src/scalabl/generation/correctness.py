"""Whether a generated answer is right: what the text says, against the answers that count.

Sources: Rajpurkar et al. 2016 (SQuAD's evaluation: normalised exact match and token F1, best over all answers); Joshi
et al. 2017 (TriviaQA's alias lists); Cobbe et al. 2021 (GSM8K: the number behind "####").
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from scalabl.core.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# thousands in groups of three, or plain digits; a decimal part; a sign that is no hyphen between words or a range
_NUMBER = re.compile(r"(?<![\w.])(?:-?[$£€]?|[$£€]-)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)-?\.\d+")
_FINAL = "####"


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words (SQuAD's evaluation).

    Beyond SQuAD: other scripts' punctuation goes too, compatibility forms are one (NFKC), and a text of which nothing
    would remain (an article or sign alone: vitamin A, C++) keeps what it has.
    """
    lower = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in lower if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", kept).split()) or " ".join(lower.split())


def answer_text(generated: str, stops: Sequence[str] = ("\n",)) -> str:
    """What a generated text answers: up to the first stop string behind its leading white space, stripped.

    Args:
        generated: a model's text.
        stops: strings that end an answer; none of them leaves the whole text.
    """
    text = generated.lstrip()
    ends = [end for stop in stops if stop and (end := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, both normalised, else 0."""
    return float(normalise_answer(prediction) in {normalise_answer(answer) for answer in _some(answers)})


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """The highest F1 of common words over all answers, 0 to 1, both normalised."""
    return max(_f1(normalise_answer(prediction).split(), normalise_answer(a).split()) for a in _some(answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if the words of one of the answers stand in the prediction, in a row; for models that answer in sentences."""
    words = f" {normalise_answer(prediction)} "
    return float(any(f" {normalise_answer(answer)} " in words for answer in _some(answers)))


def same_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction's number is that of one of the answers, exactly; see `number`.

    Raises:
        UserError: an answer has no number.
    """
    found = number(prediction)
    wanted = [number(answer) for answer in _some(answers)]
    if None in wanted:
        raise UserError(f"The answer {answers[wanted.index(None)]!r} holds no number; choose another measure for it.")
    return float(found is not None and found in wanted)


def number(text: str) -> Decimal | None:
    """What a text comes to: the number behind its first "####" where that stands, else its last; None without any.

    Thousands separators, currency signs and closing zeros do not count: "$1,250.50" is 1250.5.
    """
    found = [match.group() for match in _NUMBER.finditer(text.partition(_FINAL)[2] if _FINAL in text else text)]
    if not found:
        return None
    return Decimal(re.sub(r"[,$£€]", "", found[0 if _FINAL in text else -1]))


MEASURES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "contains": contains,
    "number": same_number,
}
"""How right an answer is, by name: (prediction, answers) -> 0 to 1."""


def correctness(
    generated: str, answers: Sequence[str], measure: str = "exact_match", *, stops: Sequence[str] | None = None
) -> float:
    """How right a generated text is, 0 to 1.

    Args:
        generated: a model's text, which `answer_text` cuts.
        answers: the answers that count, at least one.
        measure: of `MEASURES`.
        stops: strings that end an answer; the end of a line, but none for "number", which follows a calculation.

    Raises:
        UserError: no such measure, no answer, or an answer without a number where numbers are compared.
    """
    if measure not in MEASURES:
        raise UserError(f"There is no measure {measure!r} of an answer; choose one of {', '.join(MEASURES)}.")
    if stops is None:
        stops = () if measure == "number" else ("\n",)
    return MEASURES[measure](answer_text(generated, stops), answers)


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return float(prediction == answer)
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str):
        raise UserError(f"The answers are one text, {answers!r}; give a list of them.")
    if not answers:
        raise UserError("A question has no answer to compare with; give at least one.")
    return answers
