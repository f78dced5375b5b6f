"""What a small or a large file of others could cost is bounded, and said in a sentence."""

import time
from pathlib import Path

import pytest

from scalabl.core.errors import LONGEST, UserError
from scalabl.core.files import read_yaml
from scalabl.data.fields import text_of
from scalabl.data.jsonl import load_jsonl_task
from scalabl.data.records import read_objects


def recipe(path: Path) -> dict[str, object]:
    return read_yaml(path, missing="none", mend="mend it", expected="settings")


def test_aliases_of_yaml_are_bounded_and_named_by_their_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path.write_text("\n".join(lines), encoding="utf-8")
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"r.yaml is not YAML \(line 5: it stands for more than 100,000 values"):
        recipe(path)
    assert time.monotonic() - begin < 5
    path.write_text("a: &a {r: 8}\nb: [*a, '*no alias']\nc:\n  <<: *a\n", encoding="utf-8")
    assert recipe(path) == {"a": {"r": 8}, "b": [{"r": 8}, "*no alias"], "c": {"r": 8}}
    path.write_text("a: &a\n  b: *a\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: the alias \*a stands inside its own value"):
        recipe(path)


def test_a_long_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("#" * ((1 << 20) + 1), encoding="utf-8")
    with pytest.raises(UserError, match="longer than 1 MiB"):
        recipe(path)


def test_a_long_line_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.write('{"text": "a", "label": "b"}\n{"text": "')
        file.write("a" * (1 << 24))
        file.write('", "label": "c"}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:2: the line is longer than 16 MiB; shorten the row"):
        load_jsonl_task(path)
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    assert [(place, number) for place, number, _ in read_objects(path)] == [(0, 1), (10, 3)]


def test_a_long_text_is_refused_wherever_it_comes_from() -> None:
    with pytest.raises(UserError, match='row 3: "question" is longer than 16 MiB|row 3: .*longer than 16 MiB'):
        text_of({"question": "a" * ((1 << 24) + 1)}, "question", "row 3")


def test_a_sentence_is_short_and_keeps_its_mend() -> None:
    said = str(UserError(f"The key {'k' * 10**6!r} is not known; take it out."))
    assert len(said) < LONGEST + 10
    assert said.startswith("The key 'kkk") and said.endswith("is not known; take it out.")
    assert str(UserError("short")) == "short" and str(UserError()) == ""
