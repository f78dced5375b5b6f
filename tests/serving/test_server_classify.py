"""Rows over HTTP have the answers of `scalabl predict`, whatever they share a batch with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from answering import Answering, adapters, answering
from head_bases import body_of, stock_head
from program import Program
from server_runs import WORDS
from tiny_base import as_json, questions, write_jsonl

from scalabl.core.errors import UserError
from scalabl.inference.promise import Promise
from scalabl.inference.settings import PredictionSettings
from scalabl.serving.server.adapters import ServedAdapter
from scalabl.serving.server.worker import Job

ROUNDING = 1e-5  # of probabilities and nats, between batches; docs/serving.md says it

Rows = list[dict[str, Any]]


def rows_for(name: str) -> Rows:
    """Rows of unequal length that an adapter answers."""
    if name == "choices":
        return [{key: value for key, value in as_json(row).items() if key != "answer"} for row in questions(24)]
    return [{"id": f"row {i}", "text": f"{text} " * (1 + i % 5)} for i, text in enumerate(WORDS)]


def same(one: Any, other: Any) -> bool:
    """Whether two answers are the same up to rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= ROUNDING
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.fixture(scope="module")
def served(runs: dict[str, Path]) -> dict[str, ServedAdapter]:
    return adapters(**{name: runs[name] for name in ("choices", "words", "plain", "head", "writer")})


@pytest.fixture(scope="module")
def running(served: dict[str, ServedAdapter]) -> Iterator[Answering]:
    with answering(served) as found:
        yield found


def predicted(program: Program, run: Path, rows: Rows, directory: Path, *options: object) -> Rows:
    """What `scalabl predict` writes."""
    given, output = write_jsonl(directory / "rows.jsonl", rows), directory / "answers.jsonl"
    said = program("predict", run, "--input", given, "--output", output, "--batch-size", 5, *options)
    assert said.code == 0, said.err
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["choices", "words", "plain", "head"])
def test_answers_are_those_of_predict(
    program: Program, running: Answering, runs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    rows = rows_for(name)
    found = running.classify(rows, name)
    # auto chooses for the rows at hand there, and for held-out rows here
    kind = [] if name == "plain" else ["--predictive", running.server.adapters[name].predictor.settings.predictive]  # type: ignore[union-attr]
    expected = predicted(program, runs[name], rows, tmp_path, *kind)
    for answer in found:
        answer.pop("predictive", None)
    assert all(map(same, found, expected)) and len(found) == len(rows)


THRESHOLDS: dict[str, tuple[PredictionSettings, tuple[object, ...]]] = {
    "unsure": (PredictionSettings("mc", abstain=0.45), ("--abstain", 0.45)),
    "promise": (PredictionSettings("mc", promise=Promise(0.4, 0.5)), ("--max-error", 0.4, "--confidence", 0.5)),
    "out of scope": (PredictionSettings("mc", max_false_alarms=0.3), ("--max-false-alarms", 0.3)),
    "set": (PredictionSettings("mc", coverage=0.5), ("--coverage", 0.5)),
}


@pytest.mark.parametrize("kind", list(THRESHOLDS))
def test_a_null_has_its_reason_and_a_set_is_that_of_predict(
    program: Program, runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    settings, options = THRESHOLDS[kind]
    rows = rows_for("head")
    with answering(adapters(settings, head=runs["head"])) as running:
        found = running.classify(rows)
    expected = predicted(program, runs["head"], rows, tmp_path, "--predictive", "mc", *options)
    assert all(map(same, found, expected))
    if kind == "set":
        assert any(answer["set"] for answer in found)
        return
    reasons = {answer["reason"] for answer in found}
    assert kind in reasons, reasons
    assert all((answer["label"] is None) == (answer["reason"] is not None) for answer in found)


def test_requests_share_batches_and_no_answer_depends_on_it(running: Answering) -> None:
    names = ["choices", "words", "plain", "head"]
    asked = [(name, row) for row in range(24) for name in names]
    rows = {name: rows_for(name) for name in names}
    alone = {(name, row): running.classify(rows[name][row], name) for name, row in asked}
    before = running.metric("scalabl_batch_rows_count")
    with ThreadPoolExecutor(32) as threads:
        together = list(threads.map(lambda each: running.classify(rows[each[0]][each[1]], each[0]), asked))
    assert running.metric("scalabl_batch_rows_count") - before < len(asked) / 2
    assert all(same(found[0], alone[each][0]) for found, each in zip(together, asked, strict=True))


def test_texts_are_rows(running: Answering) -> None:
    one, two = running.classify("red stone", "words"), running.classify(["red stone", "bee"], "words")
    assert same(one[0], two[0]) and [answer["id"] for answer in two] == ["0", "1"]


def test_what_is_wrong_with_a_row_is_said_and_costs_no_other(running: Answering) -> None:
    def refused(given: Any, model: str = "words") -> str:
        return running.refused("/v1/classify", 400, json={"input": given, "model": model})

    assert refused(["red", {"text": " "}]).startswith('input[1]: "text" is blank')
    assert "unknown key 'color'" in refused([{"text": "red", "color": "red"}])
    assert refused("red", "choices") == 'input[0]: a text row, but there are no labels; write "question" and "choices".'
    assert "names a file" in refused([{"text": "red", "image": "/etc/passwd"}])
    assert "rows; it must have 1 to 256" in refused([])
    assert "the run was trained on" in refused([{"question": "which?", "choices": ["a", "b"]}], "head")
    half = b'{"input": {"text": "red \\ud800"}, "model": "words"}'
    sent = {"content": half, "headers": {"content-type": "application/json"}}
    assert "half a character" in running.refused("/v1/classify", 400, **sent)
    assert "with and without" in refused([{"text": "red"}, {"text": "red", "text_pair": "blue"}], "head")
    with ThreadPoolExecutor(8) as threads:
        pair = [{"text": "red", "text_pair": "blue"}]  # refused when it is read as tokens, in the batch
        futures = [threads.submit(running.classify, rows_for("head")[i], "head") for i in range(12)]
        bad = [threads.submit(running.refused, "/v1/classify", 400, json={"input": pair, "model": "head"})] * 2
        assert all(len(future.result()) == 1 for future in futures)
        assert "the run was trained on single texts" in bad[0].result()


def test_a_model_is_one_of_those_that_are_served(running: Answering) -> None:
    for name in ("nobody", "../head", "writer"):
        running.refused("/v1/classify", 404, json={"input": "red", "model": name})
    assert "4 adapters give labels" in running.refused("/v1/classify", 404, json={"input": "red"})
    listed = {model["id"]: model["scalabl"] for model in running.client.get("/v1/models").json()["data"]}
    assert list(listed) == ["choices", "words", "plain", "head", "writer"]
    assert [model["writes"] for model in listed.values()] == [True, True, True, False, True]
    assert listed["words"]["labels"] == ["no", "yes"] and not listed["writer"]["classifies"]


def test_the_weights_of_the_base_are_there_once(served: dict[str, ServedAdapter]) -> None:
    """One and the same memory under every adapter, a head's too, but for what adapters and heads have of their own."""
    places: list[set[int]] = []
    for adapter in served.values():
        own = ("lora_", "modules_to_save", "original_module", "score")
        found = [p for name, p in adapter.run.model.named_parameters() if not any(part in name for part in own)]
        places.append({p.data_ptr() for p in found})
    language = places[0]
    assert all(each == language for each in (places[1], places[2], places[4]))
    assert places[3] < language  # a head's model has no output layer of the vocabulary


def test_adapters_on_two_bases_are_refused(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="start a server for each"):
        adapters(head=runs["head"], encoder=runs["encoder"])


def test_pairs_and_single_texts_do_not_share_a_batch(tmp_path: Path) -> None:
    """A head that another trainer saved reads both, and a batch has the kinds of tokens of its first row."""
    stock_head(tmp_path / "head", body_of("bert", tmp_path / "body"))
    (tmp_path / "head" / "config.json").write_text(
        json.dumps({"id2label": {0: "red", 1: "blue", 2: "green"}}), encoding="utf-8"
    )
    rows: Rows = [{"text": text} | ({"text_pair": "a bee"} if i % 2 else {}) for i, text in enumerate(WORDS)]
    with answering(adapters(head=tmp_path / "head")) as running:
        alone = [running.classify(row) for row in rows]
        with ThreadPoolExecutor(12) as threads:
            together = list(threads.map(running.classify, rows))
    assert all(same(found[0], expected[0]) for found, expected in zip(together, alone, strict=True))


def test_a_batch_that_fails_is_answered_one_by_one(running: Answering) -> None:
    worker = running.server.worker
    calls: list[int] = []

    def work(jobs: Any) -> list[Any]:
        calls.append(len(jobs))
        if any(job.given == "bad" for job in jobs):
            raise RuntimeError("a batch fails for one of it")
        return [job.given for job in jobs]

    def slow(jobs: Any) -> list[Any]:
        import time

        time.sleep(0.3)
        return [None]

    worker.submit(Job("first", 1, 1, slow, None))
    jobs = [Job("own", 1, 4, work, given) for given in ("good", "bad", "fine")]
    futures = [worker.submit(job) for job in jobs]
    assert futures[0].result(10) == "good" and futures[2].result(10) == "fine"
    assert "ModelFailed" in repr(futures[1].exception(10)) and calls == [3, 1, 1, 1]
