"""Class weights and priors: values by hand, and each bad file refused with its mend."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.data.class_balance import (
    balance_warnings,
    class_weights,
    label_counts,
    prior_ratios,
    read_priors,
)

COUNTS = {"a": 8, "b": 1, "c": 1}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_weights_have_mean_one_over_the_rows(tmp_path: Path) -> None:
    rows = [Example(str(i), "x", ("a", "b", "c"), 0 if i < 8 else i - 7) for i in range(10)]
    assert label_counts(rows, ("a", "b", "c")) == COUNTS
    balanced = class_weights("balanced", COUNTS)
    assert balanced == pytest.approx({"a": 10 / 24, "b": 10 / 3, "c": 10 / 3})
    own = class_weights(str(write(tmp_path / "w.json", {"c": 6, "a": 1, "b": 2})), COUNTS)
    assert own == pytest.approx({"a": 1 / 1.6, "b": 2 / 1.6, "c": 6 / 1.6}) and list(own) == ["a", "b", "c"]
    for weights in (balanced, own):
        assert sum(weights[label] * count for label, count in COUNTS.items()) == pytest.approx(10)
    assert class_weights("balanced", {"a": 3, "b": 1, "c": 0}) == pytest.approx({"a": 2 / 3, "b": 2, "c": 1})


def test_priors_are_read_and_held_against_those_of_training(tmp_path: Path) -> None:
    priors = read_priors(write(tmp_path / "p.json", {"b": 0.5, "a": 0.5, "c": 0}), tuple(COUNTS))
    assert priors == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert prior_ratios(priors, COUNTS) == pytest.approx([0.5 / 0.8, 5, 0])
    assert prior_ratios({"a": 1.0, "b": 0.0}, {"a": 4, "b": 0}) == [1, 0]
    with pytest.raises(UserError, match="No row of 'b' was trained on, so that its prior must be 0"):
        prior_ratios({"a": 0.5, "b": 0.5}, {"a": 4, "b": 0})
    with pytest.raises(UserError, match="record does not say how many training rows each label has"):
        prior_ratios(priors, None)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"a": 0.5, "b": 0.3, "c": 0.1}, "The priors sum to 0.9; write probabilities that sum to 1"),
        ({"a": 0.5, "b": 0.3}, "has no probability for 'c'; write one for every label"),
        ({"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}, "names the label 'd', which the run does not have"),
        ({"a": 0.5, "b": 0.7, "c": -0.2}, "the probability of 'c' is -0.2; it must be zero or more"),
        ({"a": 0.5, "b": 0.5, "c": "0"}, "the probability of 'c' is '0'; it must be zero or more"),
        ([0.5, 0.5], "must hold a JSON object {label: probability} with every label of the run"),
    ],
)
def test_files_that_are_no_priors_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_priors(write(tmp_path / "p.json", content), tuple(COUNTS))


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the weight of 'b' is 0; it must be a positive number"):
        class_weights(str(write(tmp_path / "w.json", {"a": 1, "b": 0, "c": 1})), COUNTS)
    with pytest.raises(UserError, match="There is no file of class weights"):
        class_weights(str(tmp_path / "balancd"), COUNTS)


def test_thin_labels_are_named() -> None:
    assert balance_warnings({"a": 5, "b": 5}, {"a": 1, "b": 1}) == []
    assert balance_warnings({"a": 5, "b": 5}, {"a": 0, "b": 0}) == []  # nothing is held out
    found = balance_warnings({"a": 5, "b": 1, "c": 0}, {"a": 2, "b": 0, "c": 1})
    assert [sentence.partition(",")[0] for sentence in found] == [
        "No row of 'c' was trained on", "Of 'b' a single row was trained on", "No held-out row is of 'b'",
    ]  # fmt: skip
    many = {f"label {i}": 1 for i in range(150)}
    assert "and 145 more a single row" in balance_warnings(many, {})[0]
