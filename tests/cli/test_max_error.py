"""`--max-error`: the threshold comes from the run's own held-out rows, and answers below it are null."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from program import Program, batches_of, short
from tiny_base import as_json, questions, write_jsonl

from scalabl.inference.predictor import labels_of, log_probabilities
from scalabl.inference.promise import held_out_rows
from scalabl.metrics.selective import confidence_score, conformal_threshold, exact_threshold
from scalabl.metrics.uncertainty import average
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.training.run import train

HELD_OUT = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose task has 70 validation rows, of which it takes 60."""
    task = tmp_path_factory.mktemp("task")
    for seed, (split, number) in enumerate((("train", 24), ("validation", 70), ("test", 30))):
        write_jsonl(task / f"{split}.jsonl", map(as_json, questions(number, seed=seed)))
    output = tmp_path_factory.mktemp("runs") / "run"
    # noise that is wide enough for every score to set a threshold that some rows pass and others do not
    prior = {"prior_mean": 0.0, "prior_std": 1.0, "init_sigma": 0.05}
    train(short(task, learning_rate=0.05, steps=12, validation_rows=HELD_OUT, **prior), output)
    return output


def held_out(run: Path, samples: int = 4) -> tuple[Any, np.ndarray]:
    """(N, 60, C) log-probabilities of the held-out rows, and which answers are wrong."""
    loaded = load_run(run)
    rows = held_out_rows(loaded.record)
    log_probs = log_probabilities(loaded, rows, loaded.predictive(samples=samples))
    return log_probs, (average(log_probs).argmax(dim=1) != labels_of(rows)).numpy()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rate_that_splits(score: np.ndarray, wrong: np.ndarray) -> float:
    """A rate that can be promised of some rows, but not of all."""
    rates = np.arange(0.02, 0.99, 0.0025)
    found = [exact_threshold(score, wrong, rate, confidence=0.6).answered for rate in rates]
    return round(float(rates[[0 < answered < len(score) for answered in found].index(True)]), 4)


def test_held_out_rows_are_those_the_run_did_not_train_on(run: Path) -> None:
    record = json.loads((run / "scalabl.json").read_text())
    rows = held_out_rows(RunRecord.read(run))
    task = Path(record["recipe"]["data"])
    validation = {row["question"] for row in read(task / "validation.jsonl")}
    trained_on = {row["question"] for row in read(task / "train.jsonl")}
    assert len(rows) == HELD_OUT and {row.question for row in rows} <= validation - trained_on


def test_without_data_a_run_is_judged_on_its_own_held_out_rows(program: Program, run: Path, tmp_path: Path) -> None:
    judged = program("evaluate", run, "--predictive", "mean", "--json", tmp_path / "figures.json")
    assert judged.code == 0, judged.err
    found = json.loads((tmp_path / "figures.json").read_text())
    loaded = load_run(run)
    rows = held_out_rows(loaded.record)
    probs = average(log_probabilities(loaded, rows, loaded.predictive("mean")))
    assert found["n"] == HELD_OUT and found["data"].startswith("the held-out rows of ")
    assert found["accuracy"]["value"] == pytest.approx((probs.argmax(dim=1) == labels_of(rows)).double().mean().item())

    refused = program("evaluate", run, "--split", "test")
    assert refused.code == 2 and "--split is of --data; without it the run's held-out rows are taken" in refused.err
    record = (run / "scalabl.json").read_bytes()
    try:
        (run / "scalabl.json").write_text(json.dumps(json.loads(record) | {"bayesianized": {"source": "elsewhere"}}))
        unknown = program("evaluate", run)
    finally:
        (run / "scalabl.json").write_bytes(record)
    assert unknown.code == 2 and "is not known, so that scalabl evaluate needs --data." in " ".join(unknown.err.split())


@pytest.mark.parametrize("score", ["probability", "entropy", "epistemic"])
def test_rows_below_the_threshold_get_no_answer(
    program: Program, run: Path, rows: Path, tmp_path: Path, score: str
) -> None:
    log_probs, wrong = held_out(run)
    scores = confidence_score(log_probs, score)
    rate = rate_that_splits(scores, wrong)
    threshold = exact_threshold(scores, wrong, rate, confidence=0.6)
    plain, output = tmp_path / "plain.jsonl", tmp_path / "answers.jsonl"
    arguments = ("predict", run, "--input", rows, "--samples", 4, "--predictive", "mc", "--output")
    program(*arguments, plain)
    said = program(*arguments, output, "--max-error", rate, "--confidence", 0.6, "--score", score)
    assert (said.code, said.err) == (0, "")
    found, without = read(output), read(plain)
    key, sign = {"probability": ("confidence", 1), "entropy": ("entropy", -1), "epistemic": ("epistemic", -1)}[score]
    expected = [
        row | {"reason": None}
        if sign * row[key] > threshold.above
        else row | {"label": None, "guess": row["label"], "reason": "promise"}
        for row in without
    ]
    assert found == expected
    given = sum(row["label"] is not None for row in found)
    text = " ".join(said.out.split())
    assert threshold.sentence in text
    assert f"expected {threshold.answered / HELD_OUT:.1%} of rows answered ({threshold.answered} of 60" in text
    assert f"{threshold.wrong} of them wrong" in text
    assert f"answered {given} of 20 rows" in text
    sure = [row["confidence"] for row in found if row["label"] is not None]
    assert f"{1 - sum(sure) / len(sure):.1%} of them wrong by their own probabilities" in text
    word = {"probability": "probability above", "entropy": "entropy below", "epistemic": "mutual information below"}
    assert f"threshold {word[score]} {abs(threshold.above):.4g}"[:24] in text


def test_the_conformal_promise(program: Program, run: Path, rows: Path, tmp_path: Path) -> None:
    log_probs, wrong = held_out(run)
    rate = round(wrong.sum() / 2 / (HELD_OUT + 1), 4)  # half of the errors are too many
    threshold = conformal_threshold(confidence_score(log_probs), wrong, rate)
    assert 0 < threshold.answered < HELD_OUT
    output = tmp_path / "answers.jsonl"
    arguments = ("predict", run, "--input", rows, "--samples", 4, "--predictive", "mc", "--output", output)
    said = program(*arguments, "--max-error", rate, "--guarantee", "conformal")
    assert threshold.sentence in " ".join(said.out.split())
    assert [row["label"] is not None for row in read(output)] == [
        row["confidence"] > threshold.above for row in read(output)
    ]


def test_a_promise_that_cannot_be_kept_answers_nothing_and_says_so(
    program: Program, run: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    said = program("predict", run, "--input", rows, "--output", output, "--max-error", 0.05)
    assert said.code == 0 and "surest held-out rows are wrong" in said.out and "no row is answered" in said.out
    found = read(output)
    assert [row["label"] for row in found] == [None] * 20 and all(row["probs"] for row in found)
    assert [row["guess"] for row in found] == [max(row["probs"], key=row["probs"].get) for row in found]
    assert [row["text"] for row in found] == [row["question"] for row in read(rows)]
    # what would do is said, and does
    (step,) = [line.removeprefix("next ").strip() for line in said.out.splitlines() if line.startswith("next ")]
    task = json.loads((run / "scalabl.json").read_text())["recipe"]["data"]
    assert "would not do" in step or f"put more into {task}/validation.jsonl and train again" in step
    rate = float(step.rsplit("--max-error ", 1)[1].split()[0])
    again = program("predict", run, "--input", rows, "--output", tmp_path / "more.jsonl", "--max-error", rate)
    assert again.code == 0 and "next " not in again.out
    assert "no row is answered" not in again.out


def test_a_threshold_of_ones_own_says_what_it_came_to(program: Program, run: Path, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    said = program("predict", run, "--input", rows, "--output", output, "--abstain", 1.0)
    assert said.code == 0, said.err
    surest = max(row["confidence"] for row in read(output))
    assert f"answered 0 of 20 rows (0.0%) answers {output}" in " ".join(said.out.split())
    assert f"the surest row's confidence is {surest:.3f}; lower --abstain" in said.out


def test_a_killed_prediction_goes_on_with_its_threshold(
    program: Program, run: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_probs, wrong = held_out(run)
    rate = rate_that_splits(confidence_score(log_probs), wrong)
    options = ("--samples", 4, "--predictive", "mc", "--batch-size", 4, "--max-error", rate, "--confidence", 0.6)
    arguments = ("predict", run, "--input", rows, *options, "--output")
    program(*arguments, tmp_path / "whole.jsonl")
    output = tmp_path / "answers.jsonl"
    with batches_of(monkeypatch, killed_at=3):
        assert program(*arguments, output).code == 130
    with batches_of(monkeypatch) as calls:
        assert program(*arguments, output).code == 0
    assert calls == [4, 4, 4]
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_evaluate_marks_the_threshold_and_tells_what_became_of_it(program: Program, run: Path, tmp_path: Path) -> None:
    log_probs, wrong = held_out(run)
    rate = rate_that_splits(confidence_score(log_probs), wrong)
    threshold = exact_threshold(confidence_score(log_probs), wrong, rate, confidence=0.6)
    task = Path(json.loads((run / "scalabl.json").read_text())["recipe"]["data"])
    figures, page = tmp_path / "figures.json", tmp_path / "report.html"
    arguments = ("evaluate", run, "--data", task, "--samples", 4, "--predictive", "mc", "--json", figures)
    arguments += ("--report", page)
    assert program(*arguments).code == 0
    text = page.read_text(encoding="utf-8")
    assert "threshold_0" not in text
    assert "Against ScalaBL, mean, on the same rows" in text and 'id="training"' in text
    assert program(*arguments, "--max-error", rate, "--confidence", 0.6).code == 0
    assert page.read_text(encoding="utf-8").count('id="risk-threshold_') == 1
    output = tmp_path / "answers.jsonl"
    program("predict", run, "--input", task / "test.jsonl", "--samples", 4, "--predictive", "mc", "--output", output)
    given = [row["confidence"] > threshold.above for row in read(output)]
    rows = questions(30, seed=2)
    missed = [a["label"] != r.choices[r.answer or 0] for a, r in zip(read(output), rows, strict=True)]
    both = sum(g and m for g, m in zip(given, missed, strict=True))
    (note,) = [note for note in json.loads(figures.read_text())["notes"] if "rows answered" in note]
    assert f"{sum(given)} of 30 rows answered, {both} of them wrong. {threshold.sentence}" in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-error", 0), "max_error is 0.0; it must lie between 0 and 1"),
        (("--max-error", 1), "max_error is 1.0"),
        (("--max-error", 0.1, "--confidence", 1), "confidence is 1.0"),
        (("--max-error", 0.1, "--score", "margin"), "score is 'margin'; it must be one of probability"),
        (("--max-error", 0.1, "--guarantee", "some"), "guarantee is 'some'"),
        (("--max-error", 0.1, "--abstain", 0.5), "give one of them"),
        (("--max-error", 0.01), "it takes 299; put more into"),
        (("--max-error", 0.01), "/validation.jsonl and train again with --validation-rows 299, or raise --max-error"),
        (("--max-error", 0.01, "--guarantee", "conformal"), "it takes 99"),
        (("--max-error", 0.5, "--score", "epistemic", "--predictive", "mean"), "no epistemic part"),
    ],
)
def test_bad_settings(
    program: Program, run: Path, rows: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    before = set(tmp_path.iterdir())
    sentence = program("predict", run, "--input", rows, "--output", tmp_path / "a.jsonl", *options).sentence()
    assert message in sentence and set(tmp_path.iterdir()) == before


def test_a_promise_that_cannot_be_kept_is_refused_before_torch_is_imported(run: Path, rows: Path) -> None:
    code = "import sys; from scalabl.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    arguments = ["predict", run, "--input", rows, "--output", rows.with_name("a.jsonl"), "--max-error", 0.01]
    said = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (2, "False\n") and "it takes 299" in said.stderr


def test_held_out_rows_that_are_gone_or_changed_are_no_basis(
    program: Program, run: Path, rows: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    record = json.loads((copy / "scalabl.json").read_text())
    task = tmp_path / "task"
    arguments = ("predict", copy, "--input", rows, "--output", tmp_path / "a.jsonl", "--max-error", 0.5)
    record["recipe"]["data"] = str(task)
    (copy / "scalabl.json").write_text(json.dumps(record))
    assert f"come from {task}, which cannot be read now" in program(*arguments).sentence()
    write_jsonl(task / "train.jsonl", map(as_json, questions(90)))
    assert "has changed since the run was trained" in program(*arguments).sentence()
    (copy / "scalabl.json").write_text(json.dumps(record | {"bayesianized": {"method": "laplace"}}))
    assert "made by scalabl bayesianize" in program(*arguments).sentence()
    assert not (tmp_path / "a.jsonl").exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_promised_from_rows_that_were_labelled_anew(
    program: Program, run: Path, rows: Path, tmp_path: Path
) -> None:
    copy, task = tmp_path / "run", tmp_path / "task"
    shutil.copytree(run, copy)
    record = json.loads((run / "scalabl.json").read_text(encoding="utf-8"))
    shutil.copytree(record["recipe"]["data"], task)
    record["recipe"]["data"] = str(task)
    (copy / "scalabl.json").write_text(json.dumps(record), encoding="utf-8")
    assert held_out_rows(RunRecord.read(copy)) == held_out_rows(RunRecord.read(run))
    answered = read(task / "validation.jsonl")
    for row in answered:
        row["answer"] = next(choice for choice in row["choices"] if choice != row["answer"])
    write_jsonl(task / "validation.jsonl", answered)
    arguments = ("predict", copy, "--input", rows, "--output", tmp_path / "answers.jsonl", "--max-error", 0.5)
    assert "has changed since the run was trained on it" in program(*arguments).sentence()
    # of a run of an older version the rows are counted alone
    del record["held_out_sha256"]
    (copy / "scalabl.json").write_text(json.dumps(record), encoding="utf-8")
    assert len(held_out_rows(RunRecord.read(copy))) == HELD_OUT
