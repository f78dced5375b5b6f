"""One reader of JSON and YAML files: what it reads, and what it says about what it cannot."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalabl.core.errors import UserError
from scalabl.core.files import read_if_whole, read_json, read_yaml

Read = Callable[..., dict[str, Any]]
SENTENCES = {"missing": "There is no such thing.", "mend": "mend it", "expected": "a thing; make it again"}
both = pytest.mark.parametrize(("read", "kind"), [(read_json, "readable JSON"), (read_yaml, "YAML")])


@both
def test_a_mapping_is_read_whole(read: Read, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"name": "señal", "list": [1, 2.5, null, true]}', encoding="utf-8")
    assert read(path, **SENTENCES, key="name") == {"name": "señal", "list": [1, 2.5, None, True]}
    path.write_text("{}")
    assert read(path, **SENTENCES) == {}


@both
def test_what_is_no_mapping_or_lacks_its_key_is_refused(read: Read, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for text in ("[1]", "3", "null", '{"other": 1}'):
        path.write_text(text)
        with pytest.raises(UserError) as refused:
            read(path, **SENTENCES, key="name")
        assert str(refused.value) == f"{path} must hold a thing; make it again."


@both
def test_what_is_not_there_or_a_directory_is_refused(read: Read, kind: str, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"^There is no such thing\.$"):
            read(path, **SENTENCES)


@both
def test_broken_text_is_refused_with_its_line(read: Read, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": 1,\n "b": [}\n')
    with pytest.raises(UserError) as refused:
        read(path, **SENTENCES)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path} is not {kind} (") and sentence.endswith("); mend it.")
    assert "line 2" in sentence and "\n" not in sentence
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=rf"is not {kind} \(it is not text\); mend it\.$"):
        read(path, **SENTENCES)


def test_control_characters_in_yaml_are_one_sentence_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a: \x00")
    with pytest.raises(UserError, match=r"is not YAML \(.+\); mend it\.$"):
        read_yaml(path, **SENTENCES)


def test_yaml_builds_plain_values_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(UserError, match="is not YAML"):
        read_yaml(path, **SENTENCES)


@both
def test_a_file_that_may_not_be_read_is_named(
    read: Read, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("{}")

    def refused(*_: Any, **__: Any) -> str:
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_text", refused)  # root may read everything
    with pytest.raises(UserError, match="cannot be read .Permission denied.; change its permissions"):
        read(path, **SENTENCES)


@pytest.mark.parametrize(
    ("read", "kind", "text"),
    [
        (read_json, "readable JSON", '{"r": 8, "inner": {"r": 8, "r": 4}}'),
        (read_yaml, "YAML", "r: 8\nbeta: 1\nr: 4\n"),
        (read_yaml, "YAML", "adapter: {r: 8, r: 4}\n"),
        (read_yaml, "YAML", '"r": 8\nr: 4\n'),
    ],
)
def test_a_key_that_is_there_twice_is_refused_by_name(read: Read, kind: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"is not {kind} \(.*the key 'r' is there twice\); mend it\.$"):
        read(path, **SENTENCES)


def test_a_yaml_key_may_override_what_is_merged_into_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("a: &a {r: 8, beta: 1}\nb:\n  <<: *a\n  r: 4\n")
    assert read_yaml(path, **SENTENCES)["b"] == {"r": 4, "beta": 1}


@both
def test_what_is_nested_too_deeply_or_of_another_type_than_its_tag_is_one_sentence(
    read: Read, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    for text in ("[" * 100_000, '{"a": ' * 100_000, '{"a": !!bool maybe}', '{"a": !!int ""}', '{"a": !!timestamp x}'):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"is not {kind} \([^\n]+\); mend it\.$"):
            read(path, **SENTENCES)
    path.write_text("[" * 100_000)
    assert read_if_whole(path) is None
