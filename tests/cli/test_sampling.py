"""`--draws` and `--adaptive` of evaluate and predict."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from program import Program, batches_of
from tiny_base import as_json, questions, write_jsonl, write_task

from scalabl.inference.classifier import Classifier
from scalabl.predictive import MonteCarloPredictive
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.predictive.sampling import Sampling


def figures(program: Program, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    said = program("evaluate", *arguments, "--json", tmp_path / "figures.json")
    assert (said.code, said.err) == (0, "")
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_evaluate_with_each_kind_of_draws(
    program: Program, scalabl_run: Path, task_directory: Path, tmp_path: Path
) -> None:
    arguments = (scalabl_run, "--data", task_directory, "--samples", 4, "--predictive", "mc")
    plain = figures(program, tmp_path, *arguments)
    assert figures(program, tmp_path, *arguments, "--draws", "independent") == plain
    for kind in ("antithetic", "sobol", "moments"):
        found = figures(program, tmp_path, *arguments, "--draws", kind)
        assert found["method"] == f"ScalaBL, N = 4, {kind}" and found["nll"] != plain["nll"]


def test_evaluate_adaptively(program: Program, scalabl_run: Path, task_directory: Path, tmp_path: Path) -> None:
    arguments = (scalabl_run, "--data", task_directory, "--samples", 20, "--predictive", "mc")
    arguments += ("--calibrate", write_task(tmp_path / "held_out", validation=20))
    plain = figures(program, tmp_path, *arguments)
    found = figures(program, tmp_path, *arguments, "--adaptive", "--confidence", 0.8)
    assert found["method"] == "ScalaBL, adaptive N ≤ 20"
    assert 4 <= found["particles"] < 20 and plain["particles"] == 20
    (note,) = [note for note in found["notes"] if "particles a row" in note]
    assert note.startswith(f"{found['particles']:.1f} of at most 20 ") and "confidence 0.8 (t bound)" in note
    assert found["accuracy"] == plain["accuracy"] and found["nll"]["value"] != plain["nll"]["value"]
    assert found["further"][0]["particles"] == found["particles"]
    assert figures(program, tmp_path, *arguments, "--adaptive", "--confidence", 0.8, "--bound", "t") == found
    all_of_them = figures(program, tmp_path, *arguments, "--adaptive", "--confidence", 1)
    assert all_of_them["particles"] == 20
    assert all_of_them["nll"]["value"] == pytest.approx(plain["nll"]["value"], abs=1e-6)


def test_predict_adaptively_says_how_many_particles_and_goes_on_after_a_kill(
    program: Program, scalabl_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(9)))
    arguments = ("predict", scalabl_run, "--input", rows, "--batch-size", 2, "--samples", 20, "--predictive", "mc")
    program(*arguments, "--output", tmp_path / "all.jsonl")
    arguments += ("--adaptive", "--confidence", 0.8, "--output")
    said = program(*arguments, tmp_path / "whole.jsonl")
    found = answers(tmp_path / "whole.jsonl")
    taken = [answer["particles"] for answer in found]
    assert set(taken) <= {4, 8, 12, 16, 20} and sum(taken) < 9 * 20
    assert said.out == f"9 answers from {sum(taken) / 9:.1f} of at most 20 particles each, on average\n"
    assert [answer["label"] for answer in found] == [answer["label"] for answer in answers(tmp_path / "all.jsonl")]

    with batches_of(monkeypatch, killed_at=3):
        assert program(*arguments, tmp_path / "answers.jsonl").code == 130
    again = program(*arguments, tmp_path / "answers.jsonl")
    assert again.out == said.out
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_predict_abstains_by_the_threshold_that_it_settles(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(9)))
    arguments = ("predict", scalabl_run, "--input", rows, "--samples", 20, "--adaptive", "--output")
    program(*arguments, tmp_path / "all.jsonl")
    program(*arguments, tmp_path / "none.jsonl", "--abstain", 0.99)
    few, many = (answers(tmp_path / name) for name in ("none.jsonl", "all.jsonl"))
    assert all(answer["label"] is None for answer in few)
    # nothing can be above 0.99: which choice is best need not be settled
    assert sum(answer["particles"] for answer in few) < sum(answer["particles"] for answer in many)


def test_a_classifier_takes_the_same_settings(scalabl_run: Path) -> None:
    rows = questions(4)
    sobol = Classifier.from_pretrained(scalabl_run, samples=4, sampling=Sampling(draws="sobol"))
    assert isinstance(sobol.predictive, MonteCarloPredictive) and sobol.predictive.draws == "sobol"
    adaptive = Classifier.from_pretrained(scalabl_run, samples=20, sampling=Sampling(confidence=0.8))
    assert isinstance(adaptive.predictive, AdaptivePredictive)
    answer = adaptive(rows)
    assert answer.probs.sum(axis=1) == pytest.approx(torch.ones(4).numpy(), abs=1e-5)
    assert (answer.particle_log_probs[-1] == -torch.inf).all(axis=1).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--draws", "latin"), "choose one of independent, antithetic, sobol, moments"),
        (("--draws", "moments", "--samples", 1), "needs at least 2 --samples"),
        (("--draws", "sobol", "--adaptive"), "leave out one of the two"),
        (("--draws", "sobol", "--predictive", "mean"), "leave it out here"),
        (("--adaptive", "--predictive", "linearized"), "leave it out here"),
        (("--adaptive", "--confidence", 1.2), "above 0 and at most 1"),
        (("--adaptive", "--bound", "betting"), "t is the only bound"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    program: Program, scalabl_run: Path, rows: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    assert words in program("evaluate", scalabl_run, "--data", rows, *options).sentence()
    output = tmp_path / "answers.jsonl"
    assert words in program("predict", scalabl_run, "--input", rows, "--output", output, *options).sentence()
    assert not output.exists()


def test_a_plain_lora_has_neither(program: Program, mle_run: Path, rows: Path) -> None:
    for options in (("--draws", "sobol"), ("--adaptive",)):
        assert "leave it out here" in program("evaluate", mle_run, "--data", rows, *options).sentence()
