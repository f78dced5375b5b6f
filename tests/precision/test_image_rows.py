"""Rows with images: paths relative to their file, refused where they cannot be read, known by what is in them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from image_text import draw, write_image_task
from tiny_base import questions, write_jsonl

from scalabl.core.errors import UserError
from scalabl.data import Example, load_rows, load_task
from scalabl.data.assemble import holdout
from scalabl.data.example import open_image, rows_digest
from scalabl.inference.classifier import rows_of
from scalabl.study.tested import overlap

ROW: dict[str, Any] = {"question": "which?", "choices": ["red", "blue"], "answer": "red"}


def test_paths_are_relative_to_the_file_of_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = draw(tmp_path / "images" / "a.png", "red"), draw(tmp_path / "b.png", "blue")
    monkeypatch.chdir(tmp_path.parent)
    rows = [ROW | {"image": "images/a.png"}, ROW | {"image": ["b.png", str(one)]}, ROW]
    read = load_rows(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [row.images for row in read] == [(str(one),), (str(two), str(one)), ()]
    (text,) = load_rows(
        write_jsonl(tmp_path / "text.jsonl", [{"text": "this", "label": "yes", "image": "b.png"}]), labels=("no", "yes")
    )
    assert text.images == (str(two),) and text.choices == ("no", "yes")
    monkeypatch.chdir(tmp_path)
    assert rows_of([{"question": "which?", "choices": ["a", "b"], "image": "b.png"}], None)[0].images == (str(two),)


def test_parquet_rows_have_images_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = draw(tmp_path / "a.png", "red")
    table = pa.table({"question": ["which?"], "choices": [["red", "blue"]], "answer": ["red"], "image": [["a.png"]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet")[0].images == (str(image),)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("nowhere.png", r"rows.jsonl:1: there is no image .*nowhere.png; give its path relative to the file"),
        ("https://example.org/a.png", r"there is no image"),
        ("words.png", r"rows.jsonl:1: the image .*words.png cannot be read \(cannot identify image file"),
        ([], r'"image" is \[\]; write the path of an image, or a list of paths'),
        (["a.png", 3], r'"image" is .*; write the path of an image'),
        ("  ", r'"image" is .*; write the path of an image'),
        (None, r'"image" is None; write the path'),
    ],
)
def test_what_is_no_image_is_refused_by_its_line(image: Any, sentence: str, tmp_path: Path) -> None:
    draw(tmp_path / "a.png", "red")
    (tmp_path / "words.png").write_text("no image at all")
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW | {"image": image}])
    with pytest.raises(UserError, match=sentence):
        load_rows(path)


def test_a_truncated_image_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", "red", width=64, height=64)
    path.write_bytes(path.read_bytes()[:2000])
    (row,) = load_rows(write_jsonl(tmp_path / "rows.jsonl", [ROW | {"image": "a.png"}]))
    with pytest.raises(UserError, match="Row rows:1: the image .*a.png cannot be read"):
        open_image(row.images[0], row.id)


def test_rows_without_images_have_the_digests_that_they_had() -> None:
    rows = questions(5)
    plain = [[row.question, row.choices, row.answer] for row in rows]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    assert rows_digest(rows) == hashlib.sha256(text.encode()).hexdigest()
    assert rows[0].content == (rows[0].question, rows[0].choices)
    assert Example("a", "b", ("c", "d"), 0) == Example("a", "b", ("c", "d"), 0, ())


def test_images_count_by_what_is_in_them(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    write_image_task(here)
    shutil.copytree(here, there)
    one, other = (load_task(str(directory)).split("train") for directory in (here, there))
    assert [row.content for row in one] == [row.content for row in other]
    assert rows_digest(one) == rows_digest(other)
    held = [[row.id for row in holdout(rows, 0.3)[1]] for rows in (one, other)]
    assert held[0] == held[1]
    # all of them ask the same in words
    assert len({row.question for row in one}) == 1
    assert held[0] != [row.id for row in one[: len(held[0])]], "the same words, but not the same row"
    assert overlap(one, other) == len(one) and overlap(one, load_task(str(here)).split("test")) == 0
    draw(there / "images" / "train0.png", "blue", seed=77)
    changed = load_task(str(there)).split("train")
    assert rows_digest(changed) != rows_digest(one) and overlap(changed, one) == len(one) - 1
