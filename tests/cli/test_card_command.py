"""`scalabl card`: the picture, the card that shows it, and the words of others."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from program import Program

from scalabl.runs.card import card, write_cards
from scalabl.runs.record import RunRecord


@pytest.fixture
def run(scalabl_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    copy = tmp_path / "run"
    shutil.copytree(scalabl_run, copy)
    return copy


def test_the_card_shows_a_picture_of_the_held_out_rows(program: Program, run: Path) -> None:
    record = RunRecord.read_classifier(run)
    assert "reliability" not in (run / "README.md").read_text()
    said = program("card", run, "--samples", 3)
    assert (said.code, said.err) == (0, "") and str(run / "README.md") in said.out and "your own" not in said.out
    text = (run / "README.md").read_text()
    assert "](reliability.svg)" in text and "on 4 held-out rows" in text
    assert ModelCard(text).data.library_name == "peft"
    picture = ET.parse(run / "reliability.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "ScalaBL, N = 3" in "".join(picture.itertext())
    assert "reliability" not in (run / "mean" / "README.md").read_text()
    # a calibration that is fitted anew has no picture yet
    write_cards(run, record)
    assert (run / "README.md").read_text() == card(record)


def test_rows_of_ones_own_and_a_card_of_ones_own(program: Program, run: Path, task_directory: Path) -> None:
    (run / "README.md").write_text("My words.")
    said = program("card", run, "--samples", 2, "--data", task_directory, "--limit", 5)
    assert said.code == 0 and "which is your own and stays as it is" in said.out
    assert (run / "README.md").read_text() == "My words." and (run / "reliability.svg").is_file()


def test_what_it_does_not_read_is_refused(program: Program, run: Path) -> None:
    assert "--split is of --data" in program("card", run, "--split", "test").sentence()
