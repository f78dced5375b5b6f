"""The card of a run is made of its record, valid for the Hub, and never of words that somebody else wrote."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from scalabl.runs.card import card, write_cards
from scalabl.runs.record import RowCounts, RunRecord, TaskFacts
from scalabl.runs.settings import DEFAULTS

CALIBRATION: dict[str, Any] = {
    "scale": 0.5, "temperatures": {"mean": 1.3, "mc": 1.25}, "predictive": "mc", "samples": 10, "seed": 0, "rows": 300,
    "rows_sha256": "", "nll": {"before": 0.8, "after": 0.7}, "accuracy": 0.823,
}  # fmt: skip


@pytest.fixture
def record() -> RunRecord:
    """Of a finished classification head."""
    return RunRecord(
        recipe=DEFAULTS | {"model": "minilm-l6", "data": "tickets.jsonl"},
        status="finished",
        task=TaskFacts(name="tickets", source="tickets.jsonl", licence="unknown", labels=["bug", "question"]),
        rows=RowCounts(train=1200, validation=300),
        scoring={"scoring": "head", "labels": ["bug", "question"]},
        scoring_name="head",
        parameters={"lora": 1000, "variational": 288},
        versions={"torch": "2.13.0"},
        calibration=CALIBRATION,
        warnings=["the class bug has 3 rows"],
    )


def test_a_card_says_what_the_record_says(record: RunRecord) -> None:
    text = card(record)
    data = ModelCard(text).data
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2" and data.library_name == "peft"
    assert data.pipeline_tag == "text-classification" and data.tags is not None and "scalabl" in data.tags
    for said in ("1,200 rows", "`bug`, `question`", "0.8000", "0.7000", "82.3 %", "1.25", "0.5", "288 variational"):
        assert said in text, said
    assert "the class bug has 3 rows" in text and 'Classifier.from_pretrained("DIR")' in text
    mean = card(record, of_mean=True)
    assert (
        'AutoModelForSequenceClassification.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", num_labels=2)'
        in mean
    )
    assert "import scalabl" not in mean


def test_of_an_adapter_that_was_given_only_the_fit_is_told(record: RunRecord) -> None:
    given = replace(record, bayesianized={"method": "laplace"}, recipe=record.recipe | {"steps": 0})
    for text in (card(given), card(given, of_mean=True)):
        assert "whose posterior was fitted afterwards on 1,200 rows" in text and "trained on" not in text
        assert "no steps here" in text and "learning rate" not in text


def test_an_uncalibrated_run_on_a_local_base_names_no_base_of_the_hub(record: RunRecord) -> None:
    own = replace(record, calibration=None, recipe=record.recipe | {"model": "/models/our-bert"})
    text = card(own)
    assert ModelCard(text).data.base_model is None and "/models" not in text and "our-bert" in text
    assert "scalabl calibrate DIR --data ROWS" in text
    assert ModelCard(card(replace(own, kind="language", scoring={}))).data.pipeline_tag == "text-generation"


def test_text_of_others_is_shown_and_nothing_else(record: RunRecord) -> None:
    task = TaskFacts(name="x\n# [y](http://z)", source="<script>", licence="\x1b]0;t\x07", labels=["`a`", "b\nc"])
    text = card(replace(record, task=task, warnings=["<img src=x>"]))
    assert "# x \\# \\[y\\]\\(http://z\\)" in text and not re.search(r"(?<!\\)<(script|img)", text)
    assert "\x1b" not in text and "`'a'`, `b c`" in text


def test_a_card_of_somebody_else_stays(record: RunRecord, tmp_path: Path) -> None:
    (tmp_path / "mean").mkdir()
    (tmp_path / "README.md").write_text("---\n---\n\n# Model Card for Model ID\n\n<!-- Provide a quick summary -->\n")
    write_cards(tmp_path, record)
    assert (tmp_path / "README.md").read_text() == card(record)
    assert (tmp_path / "mean" / "README.md").read_text() == card(record, of_mean=True)
    write_cards(tmp_path, replace(record, calibration=None))
    assert (tmp_path / "README.md").read_text() == card(replace(record, calibration=None))
    for text in ("My own words.", card(record).replace("<!-- Written by scalabl", "<!-- Mine")):
        (tmp_path / "README.md").write_text(text)
        write_cards(tmp_path, record)
        assert (tmp_path / "README.md").read_text() == text
