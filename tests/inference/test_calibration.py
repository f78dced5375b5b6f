"""A calibrated run: what is fitted at the end of a training, and that every way to its predictions goes by it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import Program
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.core.errors import UserError
from scalabl.data.example import Example, rows_digest
from scalabl.inference.batch_prediction import predict_file
from scalabl.inference.calibrate import calibrate, calibration_at_the_end, fit_run
from scalabl.inference.calibration import Calibration, calibration_in_words
from scalabl.inference.classifier import Classifier
from scalabl.inference.evaluation import evaluate_run
from scalabl.inference.predictor import Predictor, labels_of
from scalabl.inference.promise import Promise
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.trained_on import trained_on
from scalabl.metrics.calibration import row_losses
from scalabl.metrics.uncertainty import apply_temperature, average, decompose
from scalabl.posterior import DiagonalGaussian
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.predictive.sampling import Sampling
from scalabl.runs.card import card
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.record import RECORD, RunRecord
from scalabl.runs.settings import Settings
from scalabl.training import run as run_module
from scalabl.training.run import train
from scalabl.tuner.layers import stochastic_layers

GIVEN = Calibration(1.6, {"mean": 1.3, "mc": 1.4, "linearized": 1.5}, "mc", 5, 0, 30, "", {"before": 1.0, "after": 0.9})


def settings_of(directory: Path, **given: Any) -> Settings:
    """Of a short run with 30 held-out rows."""
    for seed, (split, number) in enumerate((("train", 24), ("validation", 30), ("test", 10))):
        write_jsonl(directory / f"{split}.jsonl", map(as_json, questions(number, seed=seed)))
    values: dict[str, Any] = {
        "model": str(tiny_base()), "data": str(directory), "steps": 6, "batch_size": 4, "r": 4, "layers": "last:2",
        "learning_rate": 0.05, "scoring": "continuation", "normalization": "token", "init_sigma": 0.4,
    }  # fmt: skip
    return Settings.flat(**values | given)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was calibrated at its end; not to be changed."""
    directory = tmp_path_factory.mktemp("fitted")
    train(settings_of(directory), directory / "run", calibrate=calibration_at_the_end)
    return directory / "run"


@pytest.fixture
def write(fitted: Path) -> Any:
    """Puts another calibration into the run's record, until the test's end."""
    before = (fitted / RECORD).read_bytes()

    def put(calibration: Calibration | None) -> Path:
        made = None if calibration is None else calibration.as_dict()
        replace(RunRecord.read(fitted), calibration=made).write(fitted)
        return fitted

    yield put
    (fitted / RECORD).write_bytes(before)


def test_the_record_has_the_fit_of_the_held_out_rows(fitted: Path) -> None:
    record, rows = RunRecord.read_finished(fitted), questions(30, seed=1)
    made = Calibration.of(record)
    assert made is not None and made.rows == 30 and made.samples == 10 and set(made.temperatures) >= {"mean", "mc"}
    run, labels = load_run(fitted), torch.tensor([row.answer for row in rows])
    kind: Any = {"mc": MonteCarloPredictive, "linearized": LinearizedPredictive}[made.predictive]

    def nll(scale: float, temperature: float) -> float:
        strategy = kind(10, scale=scale) if made.predictive == "mc" else kind(scale=scale)
        return float(row_losses(predict(run.scorer, run.encode(rows), strategy), labels, temperature).mean())

    assert made.nll["before"] == pytest.approx(nll(1.0, 1.0), abs=1e-4)
    assert made.nll["after"] == pytest.approx(nll(made.scale, made.temperature), abs=1e-4)
    assert made.nll["after"] <= made.nll["before"]
    for factor in (0.9, 1.1):  # the temperature is a minimum
        assert nll(made.scale, made.temperature * factor) > made.nll["after"] - 1e-6
    strategy = kind(10, scale=made.scale) if made.predictive == "mc" else kind(scale=made.scale)
    right = average(predict(run.scorer, run.encode(rows), strategy)).argmax(dim=-1) == labels
    assert made.accuracy == pytest.approx(right.double().mean().item())
    words = calibration_in_words(record)
    assert (fitted / "README.md").read_text() == card(record)
    assert "fitted on 30 rows" in words and words.endswith(f", {100 * made.accuracy:.3g} % right")


def test_every_way_to_predictions_goes_by_it(write: Callable[..., Path], tmp_path: Path) -> None:
    directory, rows = write(GIVEN), questions(12, seed=4)
    run = load_run(directory)
    drawn = predict(run.scorer, run.encode(rows), MonteCarloPredictive(5, scale=1.6))
    expected = apply_temperature(drawn, 1.4)
    settings = PredictionSettings("mc", 5)
    predictor = Predictor.load(directory, settings)
    torch.testing.assert_close(predictor.log_probs(rows), expected, atol=2e-5, rtol=1e-5)
    answers, uncertainty = list(predictor.answers(rows)), decompose(expected)
    for i, answer in enumerate(answers):
        assert list(answer["probs"].values()) == pytest.approx(
            average(expected)[i][: len(rows[i].choices)].tolist(), abs=1e-5
        )
        assert answer["epistemic"] == pytest.approx(uncertainty.epistemic[i].item(), abs=1e-5)
    classified = Classifier.from_pretrained(directory, samples=5, predictive="mc")(rows)
    np.testing.assert_allclose(classified.particle_log_probs, expected.numpy(), atol=2e-5)
    predict_file(directory, rows, tmp_path / "answers.jsonl", settings)
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [w["probs"] for w in written] == [pytest.approx(a["probs"], abs=1e-5) for a in answers]
    # a worker has the settings alone, and may find a record that was fitted anew meanwhile
    resolved = json.loads(json.dumps(predictor.resolve(rows).to_dict()))
    assert resolved["scale"] == 1.6 and resolved["temperature"] == 1.4
    write(replace(GIVEN, scale=0.3))
    worker = Predictor.load(directory, PredictionSettings.from_dict(resolved))
    assert [a["probs"] for a in worker.answers(rows)] == [pytest.approx(a["probs"], abs=1e-6) for a in answers]


def test_raw_is_as_learnt_and_given_numbers_win(write: Callable[..., Path]) -> None:
    rows = questions(9, seed=4)
    before = Predictor.load(write(None), PredictionSettings("mc", 5)).log_probs(rows)
    directory = write(GIVEN)
    for settings in (PredictionSettings("mc", 5, raw=True), PredictionSettings("mc", 5, temperature=1.0)):
        assert torch.equal(Predictor.load(directory, settings).log_probs(rows), before)
    raw = Classifier.from_pretrained(directory, samples=5, predictive="mc", raw=True)(rows)
    np.testing.assert_array_equal(raw.particle_log_probs, before.numpy())
    given = Predictor.load(directory, PredictionSettings("mc", 5, temperature=2.0)).log_probs(rows)
    assert torch.equal(given, apply_temperature(before, 2.0))
    assert torch.equal(Predictor.load(directory, PredictionSettings("mc", 5)).as_learnt().log_probs(rows), before)
    identity = write(replace(GIVEN, scale=1.0, temperatures={"mc": 1.0}))
    assert torch.equal(Predictor.load(identity, PredictionSettings("mc", 5)).log_probs(rows), before)


def test_each_kind_of_predictive_has_its_own_temperature(write: Callable[..., Path]) -> None:
    directory, rows = write(GIVEN), questions(12, seed=4)
    run = load_run(directory)
    for kind, strategy in (
        ("mean", MeanPredictive()),
        ("linearized", LinearizedPredictive(scale=1.6)),
    ):
        expected = apply_temperature(predict(run.scorer, run.encode(rows), strategy), GIVEN.temperatures[kind])
        found = Predictor.load(directory, PredictionSettings(kind)).log_probs(rows)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    auto = Predictor.load(directory, PredictionSettings(samples=5))
    unresolved = auto.log_probs(rows)
    resolved = auto.resolve(rows)
    assert resolved.scale == 1.6 and resolved.predictive is not None
    assert resolved.temperature == GIVEN.temperatures[resolved.predictive]
    torch.testing.assert_close(auto.log_probs(rows), unresolved, atol=1e-6, rtol=1e-6)
    few = Predictor.load(directory, PredictionSettings(samples=5)).log_probs(rows[:3])  # too few for auto's test
    torch.testing.assert_close(few, Predictor.load(directory, PredictionSettings("mc", 5)).log_probs(rows[:3]))


def doubtful(fitted: Path) -> tuple[Run, list[Example]]:
    """A run whose doubts are right, and far too small: the rows it doubts least it answers rightly, those it doubts
    most anyhow."""
    run, rows = load_run(fitted), questions(600, seed=5)
    with torch.no_grad():
        run.scorer.model.get_output_embeddings().weight.mul_(3)
        for leaf in stochastic_layers(run.scorer.model).values():
            assert isinstance(leaf.posterior, DiagonalGaussian)
            leaf.posterior.log_std.fill_(torch.tensor(0.1).log())
    encoded = run.encode(rows)
    right = predict(run.scorer, encoded, MeanPredictive())[0].argmax(dim=1).tolist()
    doubt = decompose(predict(run.scorer, encoded, MonteCarloPredictive(50))).epistemic.argsort().tolist()
    generator = torch.Generator().manual_seed(0)
    anyhow = torch.randint(0, len(rows[0].choices), (60,), generator=generator).tolist()
    answers = {**{i: right[i] for i in doubt[:60]}, **dict(zip(doubt[-60:], anyhow, strict=True))}
    return run, [replace(rows[i], answer=answer) for i, answer in answers.items()]


def calibrated_by(run: Run, made: Calibration) -> Run:
    return replace(run, record=replace(run.record, calibration=made.as_dict()))


def test_tau_is_of_what_a_default_prediction_takes_under_it(fitted: Path) -> None:
    run, rows = doubtful(fitted)
    assert Predictor(run, PredictionSettings(raw=True)).resolve(rows).predictive == "linearized"
    # what suits the linearised one makes a posterior so wide that auto would not take it
    wide = fit_run(run, rows, PredictionSettings("linearized")).scale
    assert Predictor(run, PredictionSettings(raw=True, scale=wide)).resolve(rows).predictive == "mc" and wide > 8
    made = fit_run(run, rows)
    assert made.predictive == "mc" and made.scale < wide
    predictor = Predictor(calibrated_by(run, made))
    predictor.resolve(rows)
    losses = row_losses(predictor.log_probs(rows), labels_of(rows), 1)
    assert float(losses.mean()) == pytest.approx(made.nll["after"], rel=1e-4)
    assert predictor.as_learnt().resolve(rows).predictive == "linearized"  # it chooses by itself


def test_a_tau_that_does_not_suit_particles_is_not_theirs(fitted: Path) -> None:
    run, rows = doubtful(fitted)
    made = fit_run(run, rows, PredictionSettings("linearized"))
    assert made.temperatures.keys() == {"linearized", "mean"}
    given = calibrated_by(run, made)
    assert "calibrated for linearized and not for mc" in str(Predictor(given, PredictionSettings("mc")).settings.why)
    predictor = Predictor(given)
    assert predictor.resolve(rows).predictive == "linearized" and predictor.settings.scale == made.scale
    assert "which the run was calibrated for" in str(predictor.settings.why)
    losses = row_losses(predictor.log_probs(rows), labels_of(rows), 1)
    assert float(losses.mean()) == pytest.approx(made.nll["after"], rel=1e-4)


def test_a_run_that_was_calibrated_for_the_mean_is_predicted_by_it(write: Callable[..., Path]) -> None:
    directory = write(replace(GIVEN, scale=1.0, predictive="mean", temperatures={"mean": 1.3}))
    rows = questions(9, seed=4)
    predictor = Predictor.load(directory)
    predictor.resolve(rows)
    assert "by the mean predictive, which the run was calibrated for" in str(predictor.settings.why)
    assert torch.equal(predictor.log_probs(rows), Predictor.load(directory, PredictionSettings("mean")).log_probs(rows))


def test_what_was_not_fitted_is_said_and_left_as_learnt(write: Callable[..., Path]) -> None:
    directory, rows = write(replace(GIVEN, temperatures={"mean": 1.3, "mc": 1.4})), questions(5, seed=4)
    for settings, said in (
        (PredictionSettings("linearized"), "calibrated for mc and not for linearized; scalabl calibrate DIR"),
        (PredictionSettings("mc", 5, stochastic_layers="last:1"), "not for s in last:1 alone; leave the layers out"),
    ):
        predictor = Predictor.load(directory, settings)
        assert said in str(predictor.settings.why) and predictor.calibration is None
        raw = Predictor.load(directory, replace(settings, raw=True))
        assert raw.settings.why is None and torch.equal(predictor.log_probs(rows), raw.log_probs(rows))
    with pytest.warns(UserWarning, match="not for linearized"):
        Classifier.from_pretrained(directory, predictive="linearized")


def test_a_posterior_of_no_width_is_the_mean_by_default(write: Callable[..., Path]) -> None:
    directory, rows = write(replace(GIVEN, scale=0.0)), questions(9, seed=4)
    predictor = Predictor.load(directory)
    assert isinstance(predictor.strategy, MeanPredictive)
    assert torch.equal(predictor.log_probs(rows), Predictor.load(directory, PredictionSettings("mean")).log_probs(rows))


def test_adaptive_n_and_promises_are_of_calibrated_probabilities(write: Callable[..., Path]) -> None:
    directory, rows = write(GIVEN), questions(12, seed=4)
    full = Predictor.load(directory, PredictionSettings("mc", 12)).log_probs(rows)
    found = Predictor.load(directory, PredictionSettings("mc", 12, sampling=Sampling(confidence=0.7))).log_probs(rows)
    drawn = found != -torch.inf
    torch.testing.assert_close(found[drawn], full[drawn], atol=2e-5, rtol=1e-5)
    promised = Predictor.load(directory, PredictionSettings("mc", 12, promise=Promise(0.6, 0.5)))
    threshold = promised.resolve(rows).threshold
    held_out = questions(30, seed=1)
    tempered = Predictor.load(directory, PredictionSettings("mc", 12)).log_probs(held_out)
    assert threshold == Promise(0.6, 0.5).threshold(tempered, torch.tensor([row.answer for row in held_out]))


def test_evaluation_has_both_rows_once(write: Callable[..., Path]) -> None:
    rows, held_out = questions(10, seed=2), questions(30, seed=1)
    own = Calibration.of(RunRecord.read(write(GIVEN)))
    assert own is not None
    for calibration in (GIVEN, replace(GIVEN, scale=1.0)):
        report = evaluate_run(write(calibration), rows, {"other": held_out}, [], PredictionSettings("mc", 5), data="d")
        plain, calibrated = report.methods
        assert (plain.name, calibrated.name) == ("ScalaBL, N = 5", "ScalaBL, N = 5, calibrated")
        expected = Predictor.load(write(calibration), PredictionSettings("mc", 5))
        torch.testing.assert_close(calibrated.log_probs, expected.log_probs(rows), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(calibrated.ood["other"], expected.log_probs(held_out), atol=1e-6, rtol=1e-6)
        # two passes of one run differ in their last digits where memory is aligned otherwise
        torch.testing.assert_close(plain.log_probs, expected.as_learnt().log_probs(rows), atol=1e-6, rtol=1e-6)
        assert len(calibrated.notes) == 1
    raw = evaluate_run(write(GIVEN), rows, {}, [], PredictionSettings("mc", 5, raw=True), data="d")
    assert [method.name for method in raw.methods] == ["ScalaBL, N = 5"]
    of_these = write(replace(GIVEN, rows_sha256=rows_digest(rows, named=True)))
    optimistic = evaluate_run(of_these, rows, {}, [], PredictionSettings("mc", 5), data="d").methods[1]
    assert optimistic.notes[1].startswith("it was fitted on these very rows, so that its figures are too good")


def test_a_kill_while_it_is_fitted_resumes_to_the_same_bytes(fitted: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> Any:
        raise Killed

    settings = RunRecord.read(fitted).settings
    with pytest.raises(Killed):
        train(settings, tmp_path / "run", calibrate=kill)
    assert RunRecord.read(tmp_path / "run").status == "running"
    train(settings, tmp_path / "run", calibrate=calibration_at_the_end)
    assert (tmp_path / "run" / RECORD).read_bytes() == (fitted / RECORD).read_bytes()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {p.name for p in fitted.iterdir()}
    assert run_module.last_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize("method", ["mle", "mc_dropout", "ivon"])
def test_other_methods_are_calibrated_by_what_they_have(method: str, tmp_path: Path) -> None:
    if method == "ivon":
        pytest.importorskip("ivon")
    given = {"layers": "last:1", "steps": 2} | ({"lora_dropout": 0.2} if method == "mc_dropout" else {})
    record = train(settings_of(tmp_path, method=method, **given), tmp_path / "run", calibrate=calibration_at_the_end)
    made = Calibration.of(record)
    assert made is not None and made.predictive == ("mean" if method == "mle" else "mc")
    assert set(made.temperatures) == {"mean", made.predictive} and made.nll["after"] <= made.nll["before"]
    assert made.scale == 1 or method == "ivon"
    rows = questions(5, seed=7)
    predictor = Predictor.load(tmp_path / "run")
    raw = Predictor.load(tmp_path / "run", PredictionSettings(scale=made.scale)).log_probs(rows)
    torch.testing.assert_close(predictor.log_probs(rows), apply_temperature(raw, made.temperature))


def test_the_commands(program: Program, fitted: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    write(GIVEN)
    shifted = write_jsonl(tmp_path / "shifted.jsonl", map(as_json, questions(25, seed=8)))
    output = program("calibrate", fitted, "--data", shifted, "--predictive", "mc", "--json", tmp_path / "made.json")
    assert output.code == 0, output.err
    assert "before  posterior's scale 1.6, temperature 1.4" in output.out and "now     " in output.out
    made = Calibration.of(RunRecord.read_finished(fitted))
    assert made is not None and made.rows == 25 and made.predictive == "mc"
    assert json.loads((tmp_path / "made.json").read_text()) == made.as_dict()
    assert f"temperature {made.temperature:.3g}" in program("inspect", fitted).out
    test = fitted.parent / "test.jsonl"
    judged = program("evaluate", fitted, "--data", test, "--samples", 4, "--predictive", "mc", "--json", tmp_path / "j")
    assert judged.code == 0, judged.err
    found = json.loads((tmp_path / "j").read_text())
    assert (found["method"], found["further"][0]["method"]) == ("ScalaBL, N = 4", "ScalaBL, N = 4, calibrated")
    answers = []
    for name in ("raw", "calibrated"):
        flag = ("--raw",) if name == "raw" else ()
        done = program("predict", fitted, "--input", test, "--output", tmp_path / name, "--predictive", "mc", *flag)
        assert done.code == 0, done.err
        answers.append([json.loads(line)["confidence"] for line in (tmp_path / name).read_text().splitlines()])
    assert answers[0] != answers[1]
    few = write_jsonl(tmp_path / "few.jsonl", map(as_json, questions(7, seed=8)))
    said = program("calibrate", fitted, "--data", few).sentence()
    assert "7 labelled rows are too few to calibrate on, it takes 20" in said
    assert "it must be mean" in program("calibrate", fitted, "--data", shifted, "--predictive", "best").sentence()


def test_every_temperature_is_bounded_and_of_enough_rows(fitted: Path) -> None:
    settings, rows = PredictionSettings("mean", raw=True), questions(20, seed=5)
    found = average(Predictor(load_run(fitted), settings).log_probs(rows)).argmax(dim=-1).tolist()
    right = [replace(row, answer=answer) for row, answer in zip(rows, found, strict=True)]  # surer would be better
    tempered = evaluate_run(fitted, rows, {}, right, settings, data="d").methods[-1]
    assert tempered.notes[0] == "temperature 1.00, fitted on validation rows"
    with pytest.raises(UserError, match="19 labelled rows are too few to calibrate on, it takes 20"):
        evaluate_run(fitted, rows, {}, right[:19], settings, data="d")


def test_rows_that_the_run_was_trained_on_are_told(
    program: Program, fitted: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    write(None)
    others = list(map(as_json, questions(22, seed=8)))
    trained = [as_json(replace(row, id=f"t{i}", answer=0)) for i, row in enumerate(questions(8, seed=0))]
    few = ("--samples", 2, "--predictive", "mean")
    for name, rows in (("alone", others), ("mixed", others[:5] + trained + others[5:]), ("few", others[:19] + trained)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    alone = program("calibrate", fitted, "--data", tmp_path / "alone.jsonl", *few)
    expected = RunRecord.read(fitted).calibration
    write(None)
    mixed = program("calibrate", fitted, "--data", tmp_path / "mixed.jsonl", *few)
    assert (alone.code, mixed.code) == (0, 0) and RunRecord.read(fitted).calibration == expected
    assert "left out  8 of 30 rows, which the run was trained on" in mixed.out and "left out" not in alone.out
    said = program("calibrate", fitted, "--data", tmp_path / "few.jsonl", *few).sentence()
    assert "8 of the 27 rows, t0 the first of them, are rows that the run was trained on, and 19 others are too" in said
    made = program("evaluate", fitted, "--data", tmp_path / "mixed.jsonl", "--json", tmp_path / "j", *few)
    assert made.code == 0, made.err
    figures = json.loads((tmp_path / "j").read_text())
    for row in (figures, *figures["further"]):
        assert row["notes"][-1].startswith(
            "8 of the 30 rows, t0 the first of them, are rows that the run was trained on"
        )
    made = program("evaluate", fitted, "--json", tmp_path / "j", *few)  # its held-out rows
    assert made.code == 0 and "trained on" not in " ".join(json.loads((tmp_path / "j").read_text())["notes"])
    record = RunRecord.read(fitted)
    assert trained_on(replace(record, recipe=record.recipe | {"data": str(tmp_path / "gone")}), questions(8)) == []
    assert trained_on(replace(record, rows={"train": 23, "validation": 30}), questions(8)) == []


def test_a_run_with_few_held_out_rows_says_that_it_is_uncalibrated(program: Program, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", map(as_json, questions(20)))
    options = ("--steps", 2, "--rank", 2, "--layers", "last:1", "--scoring", "continuation")
    output = program("train", "--model", tiny_base(), "--data", tmp_path, "--output", tmp_path / "run", *options)
    assert output.code == 0, output.err
    assert "none, with 2 validation rows; scalabl calibrate DIR --data ROWS" in " ".join(output.out.split())
    assert RunRecord.read_finished(tmp_path / "run").calibration is None
    assert "none, with 2 validation rows" in " ".join(program("inspect", tmp_path / "run").out.split())


def test_a_record_with_something_else_in_its_place_is_refused(write: Callable[..., Path]) -> None:
    for altered in ({"scale": 2}, replace(GIVEN, scale=-1.0).as_dict(), replace(GIVEN, temperatures={}).as_dict()):
        directory = write(None)
        replace(RunRecord.read(directory), calibration=altered).write(directory)  # type: ignore[arg-type]
        with pytest.raises(
            UserError, match=r"scalabl\.json has a calibration that is none; run scalabl calibrate again"
        ):
            Predictor.load(directory)
    directory = write(None)
    replace(RunRecord.read(directory), calibration=[]).write(directory)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"scalabl\.json: calibration is '\[\]', which no record has"):
        Predictor.load(directory)


def test_calibrating_again_replaces_what_the_run_had(write: Callable[..., Path]) -> None:
    directory = write(GIVEN)
    before, made = calibrate(directory, questions(30, seed=1), PredictionSettings("mean"))
    assert before == GIVEN and made.predictive == "mean" and set(made.temperatures) == {"mean"} and made.scale == 1
    assert Calibration.of(RunRecord.read_finished(directory)) == made
