"""`--stochastic-layers` of train, evaluate and predict, and `inspect --variance`."""

import json
from pathlib import Path
from typing import Any

import pytest
from program import Program, train_arguments
from tiny_base import as_json, questions, write_jsonl

from scalabl.inference.predictor import Predictor
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.variance import as_top_layers, run_variance
from scalabl.predictive import LinearizedPredictive, MonteCarloPredictive
from scalabl.runs.loading import load_run
from scalabl.tuner import stochastic_layers


def figures(program: Program, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    said = program(*arguments, "--json", tmp_path / "figures.json")
    assert (said.code, said.err) == (0, "")
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    return found | {"out": said.out}


def test_inspect_measures_the_variance_of_each_layer(program: Program, scalabl_run: Path, tmp_path: Path) -> None:
    found = figures(program, tmp_path, "inspect", scalabl_run, "--variance", "--rows", 3)
    shares = {entry["name"]: entry["share"] for entry in found["variance"]}
    assert set(shares) == {layer["name"] for layer in found["layers"]} and len(shares) == 4
    assert sum(shares.values()) == pytest.approx(1)
    assert found["variance_top"]["0.99"] == "last:2"
    assert "logit variance" in found["out"] and "█" in found["out"] and "variance:0.9" in found["out"]
    run = load_run(scalabl_run)
    measured = {v.name: v.variance for v in run_variance(run, limit=3)}
    assert measured == pytest.approx({entry["name"]: entry["variance"] for entry in found["variance"]}, rel=1e-4)
    assert "variance" not in figures(program, tmp_path, "inspect", scalabl_run)


def test_evaluate_and_predict_in_the_top_layers(
    program: Program, scalabl_run: Path, task_directory: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", scalabl_run, "--data", task_directory, "--samples", 4, "--predictive", "mc")
    everywhere = figures(program, tmp_path, *arguments)
    top = figures(program, tmp_path, *arguments, "--stochastic-layers", "last:1")
    assert top["method"] == "ScalaBL, N = 4, s in last:1" and top["nll"] != everywhere["nll"]
    whole = figures(program, tmp_path, *arguments, "--stochastic-layers", "last:2")
    assert whole["nll"] == everywhere["nll"]
    share = figures(program, tmp_path, *arguments, "--stochastic-layers", "variance:1")
    assert share["method"].endswith("s in last:2") and share["nll"] == everywhere["nll"]
    sobol = figures(program, tmp_path, *arguments, "--stochastic-layers", "last:1", "--draws", "sobol")
    assert sobol["method"] == "ScalaBL, N = 4, sobol, s in last:1"

    rows = write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(6)))
    answers = {}
    for spec in ("last:1", "last:2", None):
        output = tmp_path / "answers.jsonl"
        more = ("--predictive", "mc", *(() if spec is None else ("--stochastic-layers", spec)))
        said = program("predict", scalabl_run, "--input", rows, "--output", output, "--samples", 4, *more)
        assert (said.code, said.err) == (0, "")
        answers[spec] = [json.loads(line)["probs"] for line in output.read_text().splitlines()]
    assert answers["last:2"] == answers[None] != answers["last:1"]


def test_a_run_makes_its_predictives_with_layers(scalabl_run: Path) -> None:
    run = load_run(scalabl_run)
    drawn = run.predictive("mc", samples=3, stochastic_layers="last:0.5")
    assert isinstance(drawn, MonteCarloPredictive) and (drawn.samples, drawn.stochastic_layers) == (3, "last:0.5")
    settings = PredictionSettings(predictive="linearized", stochastic_layers="variance:1.0")
    linear = Predictor(run, settings).strategy
    assert isinstance(linear, LinearizedPredictive) and linear.stochastic_layers == "last:2"
    assert as_top_layers(run, "last:1") == "last:1"


def test_train_with_stochastic_top_layers(program: Program, task_directory: Path, tmp_path: Path) -> None:
    more = (
        "--stochastic-layers",
        "last:1",
        "--stochastic-modules",
        "v_proj",
        "--empirical-prior",
        "--scoring",
        "letters",
    )
    output = tmp_path / "run"
    assert program(*train_arguments(task_directory, output, *more)).code == 0
    record = json.loads((output / "scalabl.json").read_text())
    recipe = record["recipe"]
    assert (recipe["stochastic_layers"], recipe["stochastic_modules"]) == ("last:1", "v_proj")
    assert recipe["empirical_prior"] is True
    run = load_run(output)
    assert list(stochastic_layers(run.scorer.model)) == ["model.layers.2.self_attn.v_proj"]
    assert run.scorer.trunk is not None and run.scorer.trunk.depth == 0


@pytest.mark.parametrize(
    ("command", "more", "sentence"),
    [
        ("evaluate", ("--stochastic-layers", "top"), "it must be last:K, or a fraction of them, last:0.25, or by"),
        ("evaluate", ("--stochastic-layers", "last:1", "--predictive", "mean"), "mc and linearized predictives"),
        ("evaluate", ("--stochastic-layers", "last:3"), "'last:3', but s is uncertain in 2 layers at most"),
        ("inspect", ("--variance", "--rows", 0), "--rows is 0; it must be at least 1"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(
    command: str, more: tuple[object, ...], sentence: str, program: Program, scalabl_run: Path, task_directory: Path
) -> None:
    data = ("--data", task_directory) if command == "evaluate" else ()
    assert sentence in program(command, scalabl_run, *data, *more).sentence()


def test_a_plain_lora_has_no_such_layers(program: Program, mle_run: Path, task_directory: Path) -> None:
    said = program("evaluate", mle_run, "--data", task_directory, "--stochastic-layers", "last:1")
    assert "mc and linearized predictives of ScalaBL runs" in said.sentence()
    assert "--variance is of a posterior over s" in program("inspect", mle_run, "--variance").sentence()


def test_train_refuses_what_names_nothing(program: Program, task_directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = program(*train_arguments(task_directory, output, "--stochastic-layers", "last:0"))
    assert "stochastic_layers is 'last:0'" in said.sentence() and not output.exists()
    said = program(*train_arguments(task_directory, output, "--stochastic-layers", "last:9", "--scoring", "letters"))
    assert "'last:9', but s is uncertain in 3 layers at most" in said.sentence() and not output.exists()
