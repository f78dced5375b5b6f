"""`--predictive auto`, the default of evaluate, predict and the classifier."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from program import Program
from tiny_base import as_json, questions, write_jsonl, write_task

from scalabl.core.errors import UserError
from scalabl.inference.classifier import Classifier
from scalabl.predictive import AutoPredictive, LinearizedPredictive, MeanPredictive, MonteCarloPredictive
from scalabl.predictive.sampling import Sampling
from scalabl.runs.loading import load_run


def figures(program: Program, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    said = program("evaluate", *arguments, "--json", tmp_path / "figures.json")
    assert (said.code, said.err) == (0, "")
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found | {"out": " ".join(said.out.split())}


def test_evaluate_says_what_it_chose_and_predict_answers_alike(
    program: Program, scalabl_run: Path, task_directory: Path, tmp_path: Path
) -> None:
    held_out = write_task(tmp_path / "held_out", validation=20)
    found = figures(program, tmp_path, scalabl_run, "--data", task_directory, "--calibrate", held_out)
    (sentence,) = [note for note in found["notes"] if note.startswith("auto chose ")]
    assert sentence in found["out"]
    chosen = sentence.removeprefix("auto chose ").partition(" (")[0]
    assert chosen.startswith("linearized") and found["method"] == f"ScalaBL, {chosen}"
    named = ("--predictive", "linearized")
    if "last:" in chosen:
        named += ("--stochastic-layers", chosen.partition(" in ")[2])
    by_name = figures(program, tmp_path, scalabl_run, "--data", task_directory, *named)
    assert by_name["nll"] == found["nll"] and not [note for note in by_name["notes"] if "auto" in note]

    rows, output = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(12))), tmp_path / "answers.jsonl"
    said = program("predict", scalabl_run, "--input", rows, "--output", output, "--predictive", "auto")
    assert (
        (said.code, said.err) == (0, "") and said.out.startswith("auto chose linearized") and said.out.count("\n") == 1
    )
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert {answer["predictive"] for answer in answers} == {f"ScalaBL, {said.out[11:].partition(' (')[0]}"}
    few = program("predict", scalabl_run, "--input", rows, "--output", output, "--draws", "sobol")
    assert (few.code, few.out) == (0, "")  # the draws are of mc


def test_a_method_without_s_has_a_predictive_of_its_own(
    program: Program, mle_run: Path, task_directory: Path, tmp_path: Path
) -> None:
    arguments = (mle_run, "--data", task_directory, "--predictive")
    auto, mean = (figures(program, tmp_path, *arguments, name) for name in ("auto", "mean"))
    assert auto == mean and auto["particles"] == 1


def test_what_a_record_names_is_taken(scalabl_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scalabl_run, copy)
    record = json.loads((copy / "scalabl.json").read_text())
    (copy / "scalabl.json").write_text(json.dumps(record | {"predictive": "linearized"}))
    assert isinstance(load_run(copy).predictive("auto"), LinearizedPredictive)
    assert isinstance(Classifier.from_pretrained(copy).predictive, LinearizedPredictive)
    assert isinstance(Classifier.from_pretrained(copy, predictive="mc").predictive, MonteCarloPredictive)
    assert isinstance(load_run(scalabl_run).predictive("auto"), AutoPredictive)
    assert isinstance(load_run(scalabl_run).predictive(), MonteCarloPredictive)


def test_a_classifier_chooses_too(scalabl_run: Path, mle_run: Path) -> None:
    classifier = Classifier.from_pretrained(scalabl_run)
    assert isinstance(classifier.predictive, AutoPredictive)
    few = classifier(questions(3))
    assert few.particle_log_probs.shape[0] == 10 and classifier.predictive.choice is not None
    many = classifier(questions(12))
    assert many.particle_log_probs.shape[0] == 128 and classifier.predictive.choice.name.startswith("linearized")
    drawn = Classifier.from_pretrained(scalabl_run, predictive="auto", sampling=Sampling(draws="sobol"), samples=4)
    assert isinstance(drawn.predictive, MonteCarloPredictive)
    assert isinstance(Classifier.from_pretrained(scalabl_run, samples=0).predictive, MeanPredictive)
    with pytest.raises(UserError, match="no predictive 'best'"):
        Classifier.from_pretrained(scalabl_run, predictive="best")
    with pytest.raises(UserError, match="Only an adapter with a posterior over s"):
        Classifier.from_pretrained(mle_run, predictive="linearized")
