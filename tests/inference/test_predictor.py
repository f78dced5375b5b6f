"""`Predictor`: settings that travel, what is resolved once, and `Classifier` as its face."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.core.errors import UserError
from scalabl.inference.batch_prediction import predict_file
from scalabl.inference.classifier import Classifier
from scalabl.inference.predictor import Predictor
from scalabl.inference.promise import Promise
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.selective import Threshold
from scalabl.metrics.uncertainty import apply_temperature
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive
from scalabl.predictive.sampling import Sampling
from scalabl.runs.loading import load_run
from scalabl.runs.method import load_post_hoc
from scalabl.runs.settings import Settings
from scalabl.training.run import train


def trained(directory: Path, method: str) -> Path:
    """A finished run with 30 held-out rows."""
    for seed, (split, number) in enumerate((("train", 24), ("validation", 30))):
        write_jsonl(directory / f"{split}.jsonl", map(as_json, questions(number, seed=seed)))
    settings = Settings.flat(
        model=str(tiny_base()), data=str(directory), method=method, steps=6, batch_size=4, r=4, layers="last:2",
        learning_rate=0.05, scoring="continuation", normalization="token", validation_rows=30,
    )  # fmt: skip
    train(settings, directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ScalaBL; not to be changed but for what is fitted on it."""
    return trained(tmp_path_factory.mktemp("scalabl"), "scalabl")


@pytest.mark.parametrize(
    "settings",
    [
        PredictionSettings(),
        PredictionSettings("mc", 7, 3, Sampling(confidence=0.9), "last:0.5", abstain=0.4),
        PredictionSettings(method="laplace", temperature=1.5),
        PredictionSettings(
            promise=Promise(0.1, 0.8, "entropy"), chosen="ScalaBL, linearized", why="auto chose it.",
            threshold=Threshold(math.inf, 0.1, 30, 0, 0, "none"),
        ),
        PredictionSettings(promise=Promise(0.1), threshold=Threshold(-math.inf, 0.1, 30, 30, 1, "all")),
    ],
)  # fmt: skip
def test_settings_travel_as_json(settings: PredictionSettings) -> None:
    text = json.dumps(settings.to_dict(), allow_nan=False)
    assert PredictionSettings.from_dict(json.loads(text)) == settings


def test_settings_that_exclude_each_other_or_are_out_of_range() -> None:
    for values, message in (
        ({"predictive": "best"}, "no predictive 'best'"),
        ({"samples": -1}, "samples is -1"),
        ({"method": "laplace", "predictive": "mc"}, "a predictive of its own"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"scale": -0.5}, "must be 0 \\(the mean\\) or more"),
        ({"abstain": 0.5, "promise": Promise(0.1)}, "give one of them"),
        ({"abstain": 1.5}, "between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            PredictionSettings(**values)


def test_another_process_with_the_resolved_settings_answers_alike(run: Path) -> None:
    rows = questions(12, seed=5)
    settings = PredictionSettings(samples=6, stochastic_layers="variance:0.9", promise=Promise(0.4, 0.6))
    first = Predictor.load(run, settings, batch_size=4)
    resolved = first.resolve(rows)
    assert resolved.predictive in ("mc", "linearized") and resolved.why is not None and resolved.threshold is not None
    assert str(resolved.stochastic_layers).startswith("last:") and first.resolve(rows) is resolved
    other = Predictor.load(run, PredictionSettings.from_dict(json.loads(json.dumps(resolved.to_dict()))), batch_size=4)
    assert isinstance(other.strategy, (LinearizedPredictive, MonteCarloPredictive))
    answers = list(first.answers(rows))
    assert answers == list(other.answers(rows)) and {answer["predictive"] for answer in answers} == {resolved.chosen}


def test_a_promise_answers_nothing_before_it_is_resolved(run: Path) -> None:
    predictor = Predictor.load(run, PredictionSettings("mean", promise=Promise(0.4, 0.6)))
    with pytest.raises(UserError, match=r"call resolve\(rows\) first"):
        list(predictor.answers(questions(2)))


def test_rows_are_answered_longest_first_and_written_in_their_order(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sorted(questions(20, seed=6), key=lambda row: row.id[-1])
    encoded = load_run(run).encode(rows)
    lengths: list[list[int]] = []
    answers = Predictor.answers

    def seen(self, rows, encoded):  # type: ignore[no-untyped-def]
        lengths.append([len(row.input_ids) for row in encoded])
        return answers(self, rows, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "answers", seen)
        done = predict_file(run, rows, tmp_path / "answers.jsonl", PredictionSettings("mean"), batch_size=4)
    flat = [length for batch in lengths for length in batch]
    assert len(lengths) == 5 and flat == sorted((len(row.input_ids) for row in encoded), reverse=True)
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in written] == [row.id for row in rows] and done.answered == 20
    alone = [next(Predictor.load(run, PredictionSettings("mean")).answers([row])) for row in rows[:2]]
    assert [answer["probs"] for answer in written[:2]] == [pytest.approx(one["probs"], abs=1e-5) for one in alone]


def test_a_classifier_with_a_fitted_temperature_and_with_a_given_one(run: Path) -> None:
    loaded, rows = load_run(run), questions(5, seed=4)
    fit = load_post_hoc("temperature").fit(loaded, [], questions(20, seed=3))
    plain = Classifier.from_pretrained(run, samples=4, predictive="mc")(rows)
    fitted = Classifier.from_pretrained(run, samples=4, method="temperature")(rows)
    given = Classifier.from_pretrained(run, samples=4, predictive="mc", temperature=fit["temperature"])(rows)
    expected = apply_temperature(torch.from_numpy(plain.particle_log_probs), fit["temperature"]).numpy()
    for answer in (fitted, given):
        np.testing.assert_allclose(answer.particle_log_probs, expected, atol=1e-5)


def test_a_classifier_with_a_post_hoc_method(tmp_path: Path) -> None:
    directory, rows = trained(tmp_path, "mle"), questions(4, seed=4)
    with pytest.raises(UserError, match="was not fitted"):
        Classifier.from_pretrained(directory, method="laplace")
    with pytest.raises(UserError, match="Only an adapter with a posterior over s"):
        Classifier.from_pretrained(directory, predictive="linearized")
    load_post_hoc("laplace").fit(load_run(directory), questions(24, seed=0), [])
    answer = Classifier.from_pretrained(directory, method="laplace")(rows)
    assert answer.particle_log_probs.shape[0] == 1000 and (answer.epistemic > 0).all()
    predictor = Predictor.load(directory, PredictionSettings(method="laplace"))
    np.testing.assert_allclose(answer.probs, predictor.log_probs(rows).exp().mean(dim=0).numpy(), atol=1e-5)
    assert predictor.name == "Laplace-LoRA"


def test_a_classifier_keeps_a_promise_or_abstains(run: Path) -> None:
    rows = questions(20, seed=5)
    promise = Promise(0.45, 0.6)
    classifier = Classifier.from_pretrained(run, samples=4, predictive="mc", max_error=promise)
    expected = Predictor.load(run, PredictionSettings("mc", 4, promise=promise))
    expected.resolve()
    answer = classifier(rows)
    assert answer.label == [one["label"] for one in expected.answers(rows)]
    assert classifier.predictor.settings.threshold == expected.settings.threshold
    middle = float(np.median(answer.probs.max(axis=1)))
    unsure = Classifier.from_pretrained(run, samples=4, predictive="mc", abstain=middle)(rows)
    assert [label is None for label in unsure.label] == [p < middle for p in unsure.probs.astype(float).max(axis=1)]
    assert 0 < unsure.label.count(None) < 20
    # labels of one's own are other questions than the held-out ones
    with pytest.raises(UserError, match="own prompts"):
        Classifier.from_pretrained(run, labels=["yes", "no"], max_error=0.45)
    with pytest.raises(UserError, match="even if all were answered rightly"):
        Classifier.from_pretrained(run, max_error=0.01)


def test_no_samples_are_the_mean(run: Path) -> None:
    assert isinstance(Predictor.load(run, PredictionSettings(samples=0)).strategy, MeanPredictive)
