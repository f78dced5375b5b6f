"""Without a terminal every finished cell is a line, with the time that is left."""

import json
from pathlib import Path

import pytest
from tiny_study import Done

from scalabl.study.benchmark import CellProgress, in_words, time_left
from scalabl.study.cells import ELSEWHERE, finished


def finish(done: Done, output: Path, address: str) -> None:
    directory = output / "cells" / address
    directory.mkdir(parents=True)
    (directory / "finished.json").write_bytes((done.output / "cells" / address / "finished.json").read_bytes())


def test_a_log_has_a_line_for_each_cell(done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, *_ = done.plan.cells
    finish(done, tmp_path, first)
    with CellProgress(done.plan, tmp_path) as progress:
        assert not progress()  # what was finished before is no news
        finish(done, tmp_path, second)
        assert [cell.address for cell in progress()] == [second]
        assert not progress()
    said = capsys.readouterr().err.splitlines()
    left = in_words(time_left(done.plan, tmp_path) or 0)
    assert len(said) == 1
    assert said[0].startswith(f"2/{len(done.plan.cells)} {done.plan.cells[second].label}: ")
    assert said[0].endswith(f"; about {left} left")


def test_a_cell_of_another_machine_that_is_done_again_has_a_line(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = done.plan.cells
    for address in (first, second):
        finish(done, tmp_path, address)
        path = tmp_path / "cells" / address / "finished.json"
        here = path.read_text()
        path.write_text(json.dumps(json.loads(here) | {ELSEWHERE: True}))
    with CellProgress(done.plan, tmp_path) as progress:
        assert not progress()
        path.write_text(here)
        assert [cell.address for cell in progress()] == [second]
        assert not progress()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"2/{len(done.plan.cells)} {done.plan.cells[second].label}: ")


def test_time_left_is_that_of_cells_of_the_same_kind_and_method(done: Done, tmp_path: Path) -> None:
    assert time_left(done.plan, tmp_path) is None
    training = [address for address, cell in done.plan.cells.items() if cell.kind == "training"]
    wall = {address: (finished(done.output, address) or {})["wall"] for address in training}
    finish(done, tmp_path, training[0])
    # all that is left is taken for as long as the only one that is finished
    assert time_left(done.plan, tmp_path) == pytest.approx((len(done.plan.cells) - 1) * wall[training[0]])
    assert time_left(done.plan, tmp_path, workers=2) == pytest.approx(
        (len(done.plan.cells) - 1) * wall[training[0]] / 2
    )
    assert time_left(done.plan, done.output) == 0


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (89.6, "90 s"), (720, "12 min"), (11100, "3 h 05 min")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
