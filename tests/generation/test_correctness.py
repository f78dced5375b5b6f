"""Whether a text is right: SQuAD's normalisation, aliases, numbers, and where an answer ends."""

from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from decoded_texts import at_random

from scalabl.core.errors import UserError
from scalabl.data.open_questions import OpenQuestion
from scalabl.generation.answer import answer_span
from scalabl.generation.correctness import MEASURES, answer_text, correctness, normalise_answer, number
from scalabl.generation.evaluation import answer_questions
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple, a day", "apple day"),
        ("Theatre", "theatre"),
        ("U.S.A.", "usa"),
        ("«Le Monde»", "le monde"),
        ("１２", "12"),
        ("Zürich", "zürich"),
        ("A", "a"),
        ("The The", "the the"),
        ("C++", "c"),
        ("++", "++"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_normalised(text, expected):
    assert normalise_answer(text) == expected
    assert normalise_answer(expected) == expected


@pytest.mark.parametrize(
    ("text", "answers", "exact", "f1", "inside"),
    [
        ("the Eiffel Tower", ["Eiffel tower"], 1, 1, 1),
        ("Eiffel", ["Eiffel tower"], 0, 2 / 3, 0),
        ("It is the Eiffel tower.", ["Eiffel tower"], 0, 2 * (2 / 4) / (2 / 4 + 1), 1),
        ("Samuel Clemens", ["Mark Twain", "Samuel Langhorne Clemens", "Clemens"], 0, 0.8, 1),
        ("Clemens", ["Mark Twain", "Clemens"], 1, 1, 1),
        ("tower tower", ["Eiffel tower"], 0, 0.5, 0),
        ("towering", ["tower"], 0, 0, 0),
        ("", ["A"], 0, 0, 0),
        ("", [""], 1, 1, 1),
        ("A", ["B", "a"], 1, 1, 1),
    ],
)
def test_the_best_of_all_answers_counts(text, answers, exact, f1, inside):
    assert correctness(text, answers) == exact
    assert correctness(text, answers, "f1") == pytest.approx(f1)
    assert correctness(text, answers, "contains") == inside
    assert correctness(text, answers[::-1], "f1") == pytest.approx(f1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("He has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1,250", "1250"),
        ("The answer is $1,234,567.50.", "1234567.5"),
        ("so 12 in 2 rows give 24", "24"),
        ("#### -5\nQuestion: 8 and 9?\n#### 17", "-5"),
        ("from 10-12", "12"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("50%", "50"),
        ("about .5", "0.5"),
        ("version 1.2.3", "1.2"),
        ("pages 1,2345", "2345"),
        ("the 42nd", "42"),
        ("b2b", None),
        ("none", None),
        ("####", None),
    ],
)
def test_numbers(text, value):
    assert number(text) == (None if value is None else Decimal(value))


def test_numbers_are_compared_exactly():
    assert correctness("so 6 * 7\n#### 42.0", ["#### 42"], "number") == 1
    assert correctness("0.30000001", ["0.3"], "number") == 0
    assert correctness("no idea", ["3"], "number") == 0
    assert correctness("5", ["4", "5"], "number") == 1
    # a calculation runs over lines, unless told where it ends
    assert correctness("It is 3.\n\nQuestion: 4?", ["3"], "number", stops=["\n\n"]) == 1


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        (" Paris\nQuestion: why", ("\n",), "Paris"),
        ("\n\nParis \n", ("\n",), "Paris"),
        ("Paris. Next", (".", "\n"), "Paris"),
        ("Paris\nLyon", (), "Paris\nLyon"),
        ("Paris", ("",), "Paris"),
        ("", ("\n",), ""),
    ],
)
def test_an_answer_ends_at_its_first_stop(text, stops, expected):
    assert answer_text(text, stops) == expected


def test_only_the_first_line_is_judged():
    assert correctness(" Paris\nLyon", ["paris"]) == 1
    assert correctness(" Paris\nLyon", ["Lyon"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"), [("x = --5", -5), ("-$-5", -5), ("$-5", -5), ("-$5", -5), ("$--.5", -0.5)]
)
def test_signs_in_a_row_are_no_error(text, expected):
    assert float(number(text)) == expected


def test_an_answer_that_a_measure_cannot_read_is_refused_before_any_is_generated():
    rows = [OpenQuestion("1", "How many?", ("7",)), OpenQuestion("2", "Which?", ("red",))]
    with pytest.raises(UserError, match="'red' holds no number"):
        answer_questions(Run(RunRecord({}), None, None), rows, measure="number")


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(UserError, match="no measure 'bleu'"):
        correctness("a", ["a"], "bleu")
    for measure in MEASURES:
        with pytest.raises(UserError, match="at least one"):
            correctness("a", [], measure)
        with pytest.raises(UserError, match="give a list"):
            correctness("a", "a", measure)
    with pytest.raises(UserError, match="'seven' holds no number"):
        correctness("7", ["7", "seven"], "number")


def pieces(*tokens):
    answer = at_random(length=len(tokens))
    return replace(answer, text="".join(tokens).replace("</s>", ""), tokens=list(tokens), finished=False)


def test_a_span_keeps_the_answers_tokens_and_the_one_that_ends_it():
    decoded = pieces("\n", " Pa", "ris", "\n\nQ", ": why", "\n")
    span = answer_span(decoded)
    assert span.text == "Paris" and span.finished and span.tokens == ["\n", " Pa", "ris", "\n\nQ"]
    assert span.token_ids == decoded.token_ids[:4] and span.prompt == decoded.prompt
    for name in ("total", "aleatoric", "epistemic", "intersection"):
        assert torch.equal(getattr(span, name), getattr(decoded, name)[:4])
    assert torch.equal(span.log_probs, decoded.log_probs[:, :4])


def test_a_stop_string_of_two_tokens():
    assert answer_span(pieces("a", "##", "#", "b"), ("###",)).tokens == ["a", "##", "#"]
    assert answer_span(pieces("a", "##", "#", "b"), ("#", "###")).tokens == ["a", "##"]


def test_an_answer_without_a_stop_stays_as_it_is():
    decoded = pieces(" Paris", "</s>")
    assert answer_span(decoded) is decoded
    assert answer_span(pieces("\n", "\n")).tokens == ["\n", "\n"]
