"""Addresses of stores: what a user means by one, and that a store's files answer as files of a disk do."""

import hashlib
import pickle
import re
from pathlib import Path

import pytest

from scalabl.core.errors import UserError
from scalabl.core.files import read_json, remove, require_place, sha256, write_json, writing
from scalabl.core.locations import StorePath, locate


@pytest.fixture
def store(tmp_path: Path) -> StorePath:
    """A directory behind an address, reached through pyarrow alone."""
    located = locate(f"fsspec+file://{tmp_path}/bucket/")
    assert isinstance(located, StorePath)
    return located


def test_what_an_address_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("rows/a.jsonl") == tmp_path / "rows" / "a.jsonl"
    assert locate("file:///data/my%20rows") == locate("file://localhost/data/my%20rows") == Path("/data/my rows")
    address = locate("s3://bucket/rows/?region=eu-west-1")
    assert isinstance(address, StorePath) and locate(address) is address
    below = address / "day=1" / "a.b.jsonl"
    assert str(below) == "s3://bucket/rows/day=1/a.b.jsonl"
    assert (below.name, below.stem, below.suffix) == ("a.b.jsonl", "a.b", ".jsonl")
    assert below.parent == address / "day=1" and below.parent.parent == address
    assert str(address.parent) == "s3://bucket" and address.parent.address.endswith("?region=eu-west-1")
    assert below.is_relative_to(address) and not (address.parent / "rows2").is_relative_to(address)
    assert pickle.loads(pickle.dumps(below)) == below
    Path("s3:").mkdir()
    assert locate(Path("s3://")) == tmp_path / "s3:"  # a directory of that name


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (Path("gs://bucket/rows"), r"gs:/bucket/rows is no address; write gs://bucket/rows, as text"),
        ("s3://key:secret@bucket/rows", r"s3:// with a password would be shown to others; set it in the environment"),
        ("file://elsewhere/rows", r"names the machine elsewhere; write file:///PATH"),
        ("s3://bu[ck/rows", r"s3://bu\[ck/rows is no address \(.*\); write it as s3://BUCKET/PATH"),
    ],
)
def test_an_address_that_cannot_be_meant(given: str | Path, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        locate(given)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "reason"),
    [("nowhere://bucket/rows", "Unrecognized"), ("s3:///rows", "Missing bucket"), ("fsspec+nowhere://x", "not known")],
)
def test_a_store_that_is_not_to_be_had_is_one_sentence(address: str, reason: str) -> None:
    with pytest.raises(
        UserError, match=rf"^{re.escape(address)} cannot be opened \(.*{reason}.*credentials in"
    ) as error:
        locate(address).exists()
    assert "\n" not in str(error.value)


def test_a_stores_files_are_files(store: StorePath, tmp_path: Path) -> None:
    root = tmp_path / "bucket"
    assert not store.exists() and list(store.iterdir()) == [] and list(store.iterdir(recursive=True)) == []
    file = store / "deep" / "er" / "a.txt"
    with pytest.raises(FileNotFoundError):
        file.open()
    file.write_bytes("grün\nrot\nblau".encode())
    assert (root / "deep" / "er" / "a.txt").read_text() == file.read_text() == "grün\nrot\nblau"
    assert file.is_file() and not file.is_dir() and (store / "deep").is_dir() and not (store / "dee").exists()
    with file.open("rb") as stream:
        stream.seek(6)
        assert list(stream) == [b"rot\n", b"blau"]
    assert sha256(file) == hashlib.sha256("grün\nrot\nblau".encode()).hexdigest()
    assert [path.below for path in store.iterdir()] == ["deep"]
    assert list(store.iterdir(recursive=True)) == [file]
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()
    write_json(store / "x" / "y.json", {"a": 1})
    assert read_json(store / "x" / "y.json", missing="", mend="", expected="") == {"a": 1}
    remove(store / "x")
    remove(store / "x")
    assert not (root / "x").exists() and (root / "deep").exists()


def test_what_fails_while_it_is_written_is_not_on_the_store(store: StorePath, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing(store / "a.txt") as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert not store.exists() and not unfinished.exists()
    require_place(store / "answers")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []
