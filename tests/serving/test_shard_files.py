"""What a shard is, how it is cut and read, how answers are written, and which files are refused."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sharded_rows import SIZES, address_of, all_rows, read_answers, write_shards
from tiny_base import as_json, questions, write_jsonl

from scalabl.core.errors import UserError
from scalabl.core.locations import Location, locate
from scalabl.data import load_rows
from scalabl.inference.settings import PredictionSettings
from scalabl.predictive.sampling import PLAIN
from scalabl.serving.parts import answers_in, done
from scalabl.serving.shard_manifest import Receipt, ShardManifest, count, open_output, survey, write_answers
from scalabl.serving.shards import (
    Block,
    ShardSource,
    examine,
    find_sources,
    first_rows,
    key_of,
    place_of,
    searched,
)


def source_of(path: Path) -> ShardSource:
    (source,) = find_sources(path)
    return source


def blocks_of(source: ShardSource, block_rows: int, shard: int = 0) -> list[Block]:
    return examine(source, source.stamp(), None, shard, block_rows)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("block_rows", "given"), [(1, str), (4, str), (5, str), (100, str), (5, address_of)])
def test_blocks_together_are_the_shards_rows_in_their_order(
    tmp_path: Path, suffix: str, block_rows: int, given: Callable[[Path], str]
) -> None:
    sources = find_sources(given(write_shards(tmp_path, suffix)))
    assert [source.name for source in sources] == list(SIZES)
    found = []
    for i, source in enumerate(sources):
        blocks = blocks_of(source, block_rows, shard=i)
        assert SIZES[source.name] == sum(block.rows for block in blocks)
        # read in any order, each from its own place
        parts = {block.first: block.read(None) for block in reversed(blocks)}
        assert [block.keys for block in blocks] == [(rows[0][0], rows[-1][0]) for _, rows in sorted(parts.items())]
        found += [row for first in sorted(parts) for row in parts[first]]
    expected = [(row.id, row.question, row.choices) for row in all_rows()]
    assert [(row.id, row.question, row.choices) for _, row in found] == expected
    assert found[7][0] == key_of(1, 1) and found[18][0] == key_of(1, 12) and place_of(found[18][0]) == (1, 12)
    first = first_rows(sources, None, 9)
    assert [row for _, row in first] == [row for _, row in found[:9]]
    assert first[8][0].endswith(f"part-0.{suffix}:2")


def test_blank_lines_bytes_and_missing_ids_keep_their_line_numbers(tmp_path: Path) -> None:
    lines = ["\ufeff" + json.dumps({"question": "grün?", "choices": ["ä", "ß"]}, ensure_ascii=False), "  ", ""]
    lines += [json.dumps({"question": f"{i}?", "choices": ["é", "b"]}, ensure_ascii=False) for i in range(4)]
    (tmp_path / "x.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    blocks = blocks_of(source_of(tmp_path / "x.jsonl"), 2)
    assert [(block.first, block.last, block.rows) for block in blocks] == [(1, 4, 2), (5, 6, 2), (7, 7, 1)]
    found = [row for block in blocks for _, row in block.read(None)]
    assert [row.id for row in found] == ["x:1", "x:4", "x:5", "x:6", "x:7"]
    assert tuple(found) == load_rows(tmp_path / "x.jsonl", require_answer=False)


def test_parquet_rows_are_jsonl_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [as_json(row) | {"id": i} for i, row in enumerate(questions(6))]
    rows[2]["answer"] = rows[3]["id"] = None  # a null is a field that is not there
    table = pa.Table.from_pylist(rows).append_column("__index_level_0__", pa.array(range(6)))
    pq.write_table(table, tmp_path / "rows.parquet")
    del rows[2]["answer"], rows[3]["id"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.parquet", require_answer=False) == load_rows(
        tmp_path / "rows.jsonl", require_answer=False
    )


def test_text_rows_get_the_runs_labels_in_its_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b", "label": "yes"}])
    rows = first_rows([source_of(tmp_path / "x.jsonl")], ["no", "yes"], 5)
    assert [row.choices for _, row in rows] == [("no", "yes")] * 2 and rows[1][1].answer == 1
    with pytest.raises(UserError, match=r"x\.jsonl:1: a text row, but there are no labels"):
        blocks_of(source_of(tmp_path / "x.jsonl"), 5)


def truncated(path: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([as_json(row) for row in questions(30)]), path)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def damaged(path: Path) -> Path:
    """Whole at both ends, broken between."""
    pq.write_table(pa.Table.from_pylist([as_json(row) for row in questions(30)]), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)
    return path


def rows_of(*rows: Any) -> Callable[[Path], Path]:
    return lambda path: write_jsonl(path, rows)


def empty(path: Path) -> Path:
    path.touch()
    return path


def no_json(path: Path) -> Path:
    path.write_text('{"question": "a?", "choices": ["x", "y"]}\n{"question": ')
    return path


def no_rows(path: Path) -> Path:
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    return path


ROW = {"id": "a", "question": "which?", "choices": ["red", "blue"]}


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.parquet", truncated, r"x\.parquet is no whole Parquet file \(.*\); write it again"),
        ("x.parquet", damaged, r"x\.parquet is no whole Parquet file \(.*\); write it again"),
        ("x.parquet", empty, r"x\.parquet is no whole Parquet file"),
        ("x.parquet", no_rows, r"x\.parquet has no rows"),
        ("x.jsonl", empty, r"x\.jsonl is empty"),
        ("x.jsonl", no_json, r"x\.jsonl:2: not JSON"),
        ("x.jsonl", rows_of(ROW, ROW), r"x\.jsonl:2: the id 'a' is also that of .*x\.jsonl:1"),
        ("x.jsonl", rows_of(ROW, {"question": "b?", "choices": ["red"]}), r"x\.jsonl:2: only one choice"),
        ("x.jsonl", rows_of(ROW, {"text": "b"}), r"x\.jsonl:2: text rows and question rows in one file"),
    ],
)
def test_bad_shards_are_refused_with_their_place(
    tmp_path: Path, name: str, write: Callable[[Path], Path], message: str
) -> None:
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / name)
    sources = find_sources(tmp_path / "rows")
    with pytest.raises(UserError, match=message) as error:
        survey(tmp_path / "out", "jsonl", ShardManifest({}, {}), sources, None, 5)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path / "rows" / name, require_answer=False)


def test_what_names_no_shards(tmp_path: Path) -> None:
    for given, message in [
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "holds no .jsonl and no .parquet file"),
        (tmp_path / "*.jsonl", "No file matches"),
    ]:
        with pytest.raises(UserError, match=message):
            find_sources(given)
    write_jsonl(tmp_path / "a.jsonl", [ROW])
    write_jsonl(tmp_path / "a.json", [ROW])
    with pytest.raises(UserError, match="would have one file of answers"):
        find_sources(tmp_path / "a.json*")
    (tmp_path / "b.parquet").touch()
    with pytest.raises(UserError, match="has JSONL and Parquet files"):
        find_sources(tmp_path)
    for hidden in ("_temporary", ".cache"):
        write_jsonl(tmp_path / hidden / "c.jsonl", [ROW])
    assert [source.name for source in find_sources(tmp_path / "*.jsonl")] == ["a"]
    write_jsonl(tmp_path / "deep" / "er" / "d.jsonl", [ROW])
    assert [source.name for source in find_sources(tmp_path / "deep" / "**" / "*.jsonl")] == ["d"]
    assert source_of(tmp_path / "a.jsonl").name == "a"


def test_a_shard_that_changes_under_way_is_not_read(tmp_path: Path) -> None:
    source = source_of(write_jsonl(tmp_path / "x.jsonl", map(as_json, questions(6))))
    last = blocks_of(source, 4)[1]
    write_jsonl(tmp_path / "x.jsonl", map(as_json, questions(7)))
    with pytest.raises(UserError, match="has changed since the work began"):
        last.read(None)


def answer(i: int, *, adaptive: bool = True) -> dict[str, Any]:
    """An answer whose choices sort otherwise than they stand."""
    made = {
        "id": f"q{i}", "label": None if i % 3 == 0 else "zebra", "probs": {"zebra": 0.75, "ant": 0.25 / (i + 1)},
        "confidence": 0.75, "entropy": 0.1 * i, "aleatoric": 0.1, "epistemic": 1e-9 * i,
    }  # fmt: skip
    return made | {"particles": i} if adaptive else made


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_answers_of_several_labels_sets_and_reasons(tmp_path: Path, format: str) -> None:
    several, one = [answer(i, adaptive=False) for i in range(3)], [answer(i, adaptive=False) for i in range(3)]
    for i, made in enumerate(several):
        del made["label"]
        made["labels"] = [["zebra", "ant"], [], None][i]
    for i, made in enumerate(one):
        made |= {"set": [["zebra"], ["ant", "zebra"], None][i], "reason": [None, "out of scope", "unsure"][i]}
    for found, answered in ((several, 2), (one, 2)):
        path = tmp_path / f"{answered}-{len(found[0])}.{format}"
        receipt = Receipt(3, answered, None)
        assert write_answers([json.dumps(made) for made in found], path, format) == receipt
        assert read_answers(path) == found and count(path, format, 3) == receipt


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
@pytest.mark.parametrize(("adaptive", "given"), [(True, str), (False, str), (True, address_of)])
def test_answers_come_back_as_they_were_given(
    tmp_path: Path, format: str, adaptive: bool, given: Callable[[Path], str]
) -> None:
    found = [answer(i, adaptive=adaptive) for i in range(7)]
    found[0]["label"] = None
    whole, receipt = tmp_path / "deep" / f"whole.{format}", Receipt(7, 4, 21 if adaptive else None)
    place = locate(given(whole))
    assert write_answers([json.dumps(answer) for answer in found], place, format) == receipt
    read = read_answers(whole)
    assert read == found and [list(a["probs"]) for a in read] == [["zebra", "ant"]] * 7
    assert count(place, format, 7) == receipt
    with pytest.raises(UserError, match="has 7 answers for 8 rows; delete it"):
        count(place, format, 8)
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(UserError, match="no longer what was written"):
        count(place, format, 7)
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_an_output_that_cannot_be_written_or_is_not_ours(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "rows", "jsonl")
    sources, wanted = find_sources(shards), ShardManifest({}, {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    write_jsonl(tmp_path / "broken" / "manifest.json", [{"shards": [1]}])
    before = set(tmp_path.rglob("*"))
    for output, message in [
        (Path("/proc/answers"), "cannot be written"),
        (tmp_path / "rows" / "a.jsonl", "answers would be taken for shards"),
        (tmp_path / "full" / "mine.txt", "cannot be written"),
        (shards / "answers", "answers would be taken for shards"),
        (shards, "answers would be taken for shards"),
        (tmp_path / "full", r"is not empty and holds no manifest\.json"),
        (tmp_path / "broken", "is no manifest of answers"),
    ]:
        with pytest.raises(UserError, match=message):
            open_output(output, wanted, shards, sources)
    with pytest.raises(UserError, match="lies in .*rows, where its answers would be taken"):
        open_output(shards / "answers", wanted, shards / "**" / "*.jsonl", sources)
    # where files are looked for in one directory alone, the answers may lie below it
    assert open_output(shards / "answers", wanted, shards / "*.jsonl", sources[:1]) is wanted
    assert open_output(tmp_path / "new", wanted, shards, sources) is wanted
    assert set(tmp_path.rglob("*")) == before


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "rows", "jsonl")
    sources, settings = find_sources(shards), {"predictive": "auto", "samples": 10, "stochastic_layers": None}
    settings |= {"seed": 0, "sampling": asdict(PLAIN), "abstain": 0.5, "promise": None, "format": "jsonl"}
    manifest = ShardManifest({"a": 1}, settings)
    manifest.shards, blocks = survey(tmp_path, "jsonl", manifest, sources, None, 3)
    assert [shard.rows for shard in manifest.shards.values()] == [*SIZES.values()] and len(blocks) == 9
    manifest.resolved, manifest.weight_bytes = PredictionSettings("mc", abstain=0.5, chosen="MC", why="so"), 4
    manifest.device = "CPU"
    manifest.receipts["a"] = Receipt(7, 3, None)
    (tmp_path / "out").mkdir()
    manifest.write(tmp_path / "out")
    assert open_output(tmp_path / "out", ShardManifest({"a": 1}, settings), shards, sources) == manifest

    # as version 0.1 wrote it at first
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del content["resolved"], content["weight_bytes"]
    chosen = {"predictive": "mc", "stochastic_layers": None, "name": "MC", "why": "so", "threshold": None}
    content["decision"] = chosen | {"weight_bytes": 4}
    for shard in content["shards"]:
        del shard["index"]
        shard |= {"block_rows": 3, "starts": [[0, 1]]}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(content))
    assert open_output(tmp_path / "out", ShardManifest({"a": 1}, settings), shards, sources) == manifest


def test_a_shard_that_has_changed_gets_another_index(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "rows", "jsonl")
    manifest = ShardManifest({}, {})
    manifest.shards, _ = survey(tmp_path, "jsonl", manifest, find_sources(shards), None, 512)
    write_jsonl(shards / "day=1" / "part-0.jsonl", [ROW])
    now, blocks = survey(tmp_path, "jsonl", manifest, find_sources(shards), None, 512)
    assert {shard.name: shard.index for shard in now.values()} == {"a": 0, "day=1/part-0": 3, "day=2/part-0": 2}
    assert [block.shard for block in blocks] == [0, 3, 2]


@pytest.mark.parametrize(
    "pattern",
    [
        "a.jsonl",
        "",
        "*.jsonl",
        "day=?/*.jsonl",
        "day=[12]/*.jsonl",
        "**/*.jsonl",
        "**/part-0.jsonl",
        "*/part*",
        "deep/**",
    ],
)
def test_an_address_names_the_shards_that_the_path_names(tmp_path: Path, pattern: str) -> None:
    write_shards(tmp_path, "jsonl")
    for hidden in ("_temporary", ".cache", "day=1/.part"):
        write_jsonl(tmp_path / hidden / "c.jsonl", [ROW])
    write_jsonl(tmp_path / "deep" / "er" / ".d.jsonl", [ROW])
    write_jsonl(tmp_path / "deep" / "er" / "d.jsonl", [ROW])
    pattern = pattern.replace("?", "*") if "[" not in pattern else pattern  # behind a ? are an address's options
    here, there = (find_sources(f"{base}/{pattern}") for base in (tmp_path, address_of(tmp_path)))
    assert [source.name for source in there] == [source.name for source in here] != []
    assert [str(source.path) for source in there] == [address_of(Path(str(source.path))) for source in here]
    assert [source.stamp()[0] for source in there] == [source.stamp()[0] for source in here]
    searches = [searched(f"{base}/{pattern}") for base in (tmp_path, address_of(tmp_path))]
    assert searches[1] == (None if searches[0] is None else locate(address_of(Path(str(searches[0])))))


def test_addresses_that_name_no_shards_or_no_place_for_answers(tmp_path: Path) -> None:
    store = address_of(write_shards(tmp_path / "rows", "jsonl"))
    for given, message in [
        (f"{store}/none", "holds no .jsonl and no .parquet file"),
        (f"{store}/none/*.jsonl", "No file matches"),
        ("nowhere://rows", "cannot be opened"),
    ]:
        with pytest.raises(UserError, match=message):
            find_sources(given)
    sources, wanted = find_sources(store), ShardManifest({}, {})
    with pytest.raises(UserError, match="answers would be taken for shards"):
        open_output(locate(f"{store}/answers"), wanted, store, sources)
    assert open_output(locate(f"{store}/answers"), wanted, f"{store}/a.jsonl", sources) is wanted
    with pytest.raises(UserError, match=r"is not empty and holds no manifest\.json"):
        open_output(locate(f"{store}/day=1"), wanted, f"{store}/a.jsonl", sources)
    write_jsonl(tmp_path / "rows" / "e.jsonl", [ROW | {"image": "a.png"}])
    with pytest.raises(UserError, match=r"e\.jsonl:1: images are not read from a store; give the whole path of a\.png"):
        first_rows(find_sources(f"{store}/e.jsonl"), None, 1)


@pytest.mark.parametrize("given", [str, address_of])
def test_halves_of_parts_are_taken_away_and_their_rows_are_not_done(
    tmp_path: Path, given: Callable[[Path], str]
) -> None:
    """As a kill leaves them on a file system; what was answered twice counts once."""
    parts: Location = locate(given(tmp_path / "parts"))
    assert done(parts).tolist() == [] and answers_in(parts) == {}
    for name, keys in {"1": [3, -4], "2": [2, 3], "3": [4, 5], "4": [6]}.items():
        path = tmp_path / "parts" / "shard=0" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"key": pa.array(keys, pa.int64()), "answer": [f"{name}-{key}" for key in keys]}), path)
    half = tmp_path / "parts" / "shard=0" / "3.parquet"
    half.write_bytes(half.read_bytes()[:-1])
    (tmp_path / "parts" / "shard=0" / "4.parquet").write_bytes(b"")
    assert done(parts).tolist() == [2, 3]
    assert sorted(path.name for path in tmp_path.rglob("*.parquet")) == ["1.parquet", "2.parquet"]
    assert answers_in(parts / "shard=0") == {-4: "1--4", 2: "2-2", 3: "1-3"}


@pytest.mark.parametrize("several", [False, True])
def test_what_stands_beside_a_null_is_a_column_of_its_own(tmp_path: Path, several: bool) -> None:
    import pyarrow.parquet as pq

    from scalabl.serving.batch import write_answers

    key, best = ("labels", ["yes"]) if several else ("label", "yes")
    common = {"probs": {"yes": 0.7, "no": 0.3}, "confidence": 0.7}
    given = {"id": "a", "text": "one", key: best, **common}
    withheld = {"id": "b", "text": "two", key: None, "guess": best, **common}
    path = tmp_path / "answers.parquet"
    receipt = write_answers([json.dumps(given), json.dumps(withheld)], path, "parquet")
    assert (receipt.rows, receipt.answered) == (2, 1)
    rows = pq.read_table(path).to_pylist()
    assert [row["guess"] for row in rows] == [None, best] and [row[key] for row in rows] == [best, None]
    assert [row["text"] for row in rows] == ["one", "two"]
