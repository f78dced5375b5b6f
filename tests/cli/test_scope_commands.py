"""Rows out of scope and sets of labels: thresholds from held-out rows, null with its reason, scores of --ood."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import Program, short
from tiny_base import tiny_encoder, write_jsonl, write_texts

from scalabl import Classifier
from scalabl.core.files import FEATURES
from scalabl.inference.predictor import Predictor
from scalabl.inference.promise import held_out_rows
from scalabl.inference.scope import number_of, row_scores
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.conformal import label_scores, label_sets, set_thresholds
from scalabl.metrics.uncertainty import average
from scalabl.runs.loading import load_run
from scalabl.training.run import train

HELD_OUT = 39
SETTINGS = PredictionSettings("mc", 3)
DRAWN = ("--predictive", "mc", "--samples", 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = write_texts(tmp_path_factory.mktemp("texts"), validation=HELD_OUT, test=20)
    output = tmp_path_factory.mktemp("runs") / "run"
    changes = {"model": str(tiny_encoder()), "scoring": "head", "normalization": "auto", "steps": 12}
    train(short(texts, **changes, learning_rate=0.02, validation_rows=HELD_OUT), output)
    return output


@pytest.fixture
def rows(run: Path) -> Path:
    return Path(json.loads((run / "scalabl.json").read_text())["recipe"]["data"]) / "test.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out(run: Path) -> tuple[Predictor, list[Any], torch.Tensor]:
    predictor = Predictor(load_run(run), SETTINGS)
    found = list(held_out_rows(predictor.whole_run().record))
    return predictor, found, predictor.log_probs(found)


def quantile(scores: np.ndarray, rate: float) -> float:
    return float(np.sort(scores)[math.ceil((len(scores) + 1) * rate - 1e-9) - 1])


def altered(run: Path, to: Path) -> Path:
    """The run without what runs of older versions do not have."""
    shutil.copytree(run, to)
    (to / FEATURES).unlink()
    record = json.loads((to / "scalabl.json").read_text())
    del record["features_sha256"]
    (to / "scalabl.json").write_text(json.dumps(record))
    return to


@pytest.mark.parametrize("score", ["distance", "energy", "entropy", "probability", "epistemic"])
def test_rows_beyond_the_threshold_are_out_of_scope(
    program: Program, run: Path, rows: Path, tmp_path: Path, score: str
) -> None:
    predictor, found, log_probs = held_out(run)
    of_mean = predictor.mean_scores(found, dataset="held-out rows")
    # a float32 softmax misses one by more than the epistemic part of a few steps is exact to
    particles = log_probs.double().log_softmax(dim=2)
    known = {
        "probability": -average(log_probs).amax(dim=1),
        "entropy": -(average(log_probs) * average(log_probs).log()).sum(dim=1),
        "epistemic": -(average(log_probs) * average(log_probs).log()).sum(dim=1)
        + (particles.exp() * particles).sum(dim=2).mean(dim=0),
        **of_mean,
    }[score]
    above = quantile(known.double().numpy(), 0.6)
    output = tmp_path / "answers.jsonl"
    arguments = ("predict", run, "--input", rows, *DRAWN, "--output", output, "--max-false-alarms", 0.4)
    chosen = () if score == "distance" else ("--oos-score", score)  # the distance is the default
    said = program(*arguments, *chosen)
    assert (said.code, said.err) == (0, "")
    answers = read(output)
    key, sign = {"probability": ("confidence", -1)}.get(score, (score, 1))
    beyond = [sign * answer[key] > above + 1e-9 for answer in answers]
    assert [answer["reason"] for answer in answers] == ["out of scope" if out else None for out in beyond]
    assert [answer["label"] is None for answer in answers] == beyond and 0 < sum(beyond) < 20
    text = " ".join(said.out.split())
    where = f"probability below {-above:.4g}" if score == "probability" else f"{score} above {above:.4g}"
    assert f"scope null where {where}: at most 40 % of rows in scope" in text
    assert f"answered {20 - sum(beyond)} of 20 rows" in text


@pytest.mark.parametrize("kind", ["lac", "aps", "raps"])
def test_a_set_has_the_labels_up_to_the_threshold(
    program: Program, run: Path, rows: Path, tmp_path: Path, kind: str
) -> None:
    _, found, log_probs = held_out(run)
    scores = label_scores(average(log_probs).numpy(), kind, [number_of(row) for row in found])
    right = scores[np.arange(HELD_OUT), [row.answer for row in found]]
    output = tmp_path / "answers.jsonl"
    arguments = ("predict", run, "--input", rows, *DRAWN, "--output", output, "--coverage", 0.7)
    said = program(*arguments, "--set-score", kind)
    assert (said.code, said.err) == (0, "") and "hold the right label of at least 70 % of rows" in said.out
    answers = read(output)
    examples = list(predictor_rows(run, rows))
    own = [list(answer["probs"].values()) for answer in answers]
    inside = label_scores(own, kind, [number_of(row) for row in examples]) <= quantile(right, 0.7) + 1e-9
    inside[np.arange(20), np.argmax(own, axis=1)] = True
    for answer, of_row in zip(answers, inside, strict=True):
        labels = sorted(answer["probs"], key=lambda label: -answer["probs"][label])
        kept = [label for label in labels if of_row[list(answer["probs"]).index(label)]]
        assert answer["set"] == (None if len(kept) == 3 else kept)
        assert "reason" not in answer and answer["label"] is not None
    assert any(answer["set"] is not None for answer in answers)


def predictor_rows(run: Path, rows: Path) -> Any:
    from scalabl.data.jsonl import load_rows
    from scalabl.runs.record import RunRecord

    return load_rows(rows, RunRecord.read(run).labels)


def test_reasons_of_several_kinds_and_the_same_from_python(
    program: Program, run: Path, rows: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    arguments = ("predict", run, "--input", rows, *DRAWN, "--output", output)
    assert program(*arguments, "--max-false-alarms", 0.5, "--abstain", 0.6, "--coverage", 0.8).code == 0
    answers = read(output)
    reasons = [answer["reason"] for answer in answers]
    assert {"out of scope", "unsure"} <= set(reasons)
    for answer in answers:
        assert (answer["label"] is None) == (answer["reason"] is not None)
        assert answer["reason"] == "out of scope" or (answer["confidence"] < 0.6) == (answer["reason"] == "unsure")
    python = Classifier.from_pretrained(
        run, predictive="mc", samples=3, abstain=0.6, max_false_alarms=0.5, coverage=0.8
    )([row["text"] for row in read(rows)])
    assert python.reason == reasons and python.sets == [answer["set"] for answer in answers]
    assert python.label == [answer["label"] for answer in answers] and python.distance is not None
    assert python.distance.tolist() == pytest.approx([answer["distance"] for answer in answers], rel=1e-4, abs=1e-3)


def test_a_run_of_an_older_version_answers_as_it_did(program: Program, run: Path, rows: Path, tmp_path: Path) -> None:
    old, output = altered(run, tmp_path / "old"), tmp_path / "answers.jsonl"
    arguments = ("predict", old, "--input", rows, *DRAWN, "--output", output)
    assert program(*arguments, "--abstain", 0.6).code == 0
    known = {"id", "text", "label", "guess", "probs", "confidence", "entropy", "aleatoric", "epistemic", "reason"}
    assert set(read(output)[0]) | {"guess"} == known
    said = program(*arguments, "--max-false-alarms", 0.4)
    assert said.code == 0 and "null where entropy above" in " ".join(said.out.split())
    said = program(*arguments, "--max-false-alarms", 0.4, "--oos-score", "distance").sentence()
    assert "keeps no features of its training rows" in said and "train it again" in said


def test_evaluate_tells_rows_without_the_run_s_labels_apart(
    program: Program, run: Path, rows: Path, tmp_path: Path
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": f"ninety-nine bee {i}", "label": "oos"} for i in range(12)])
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": f"{row['text']} no"} for row in read(rows)])
    figures, page = tmp_path / "figures.json", tmp_path / "report.html"
    said = program(
        "evaluate", run, "--data", rows, *DRAWN, "--ood", other, "--ood", bare, "--json", figures, "--report", page
    )
    assert said.code == 0, said.err
    found = json.loads(figures.read_text())["ood"]
    assert set(found) == {str(other), str(bare)}
    for name, number in ((str(other), 12), (str(bare), 20)):
        assert found[name]["n"] == number and "accuracy" not in found[name]
        assert set(found[name]["scores"]) == {"probability", "entropy", "epistemic", "energy", "distance"}
        assert found[name]["scores"]["entropy"]["auroc"] == found[name]["auroc_total"]
    predictor = Predictor(load_run(run), SETTINGS)
    known = predictor.mean_scores(list(predictor_rows(run, rows)), dataset="known")
    labels = predictor.whole_run().record.labels
    from scalabl.data.load import shifted_rows

    far = predictor.mean_scores(shifted_rows(str(other), labels=labels), dataset="far")
    for score in ("energy", "distance"):
        pairs = far[score][:, None] - known[score][None]
        area = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
        assert found[str(other)]["scores"][score]["auroc"]["value"] == pytest.approx(area, abs=0.01)
    assert 'id="scope"' in page.read_text(encoding="utf-8") and "FPR95" in said.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--coverage", 1.5), "The coverage is 1.5; it must lie between 0 and 1"),
        (("--coverage", 0.99), "takes at least 99 held-out rows, and the run has 39; put "),
        (("--coverage", 0.95, "--per-class"), "takes at least 19 held-out rows of each, and 'about blue' has 13"),
        (("--coverage", 0.8, "--set-score", "top"), "no score of sets 'top'; choose one of lac, aps, raps"),
        (("--max-false-alarms", 0.0), "The share of false alarms is 0.0; it must lie between 0 and 1"),
        (("--max-false-alarms", 0.01), "take at least 99 held-out rows, and the run has 39"),
        (("--max-false-alarms", 0.3, "--oos-score", "far"), "no score of scope 'far'; choose one of probability"),
        (("--max-false-alarms", 0.3, "--oos-score", "epistemic", "--predictive", "mean"), "has no epistemic part"),
        (("--oos-score", "entropy"), "--oos-score is of --max-false-alarms; leave it out"),
        (("--per-class",), "--per-class is of --coverage; leave it out"),
    ],
)
def test_what_cannot_be_promised_is_refused(
    program: Program, run: Path, rows: Path, tmp_path: Path, options: tuple[object, ...], sentence: str
) -> None:
    output = tmp_path / "answers.jsonl"
    assert sentence in program("predict", run, "--input", rows, "--output", output, *options).sentence()
    assert not output.exists()


def test_an_altered_file_of_features_is_refused(program: Program, run: Path, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    content = bytearray((other / FEATURES).read_bytes())
    content[-1] ^= 1
    (other / FEATURES).write_bytes(content)
    said = program("predict", other, "--input", rows, "--output", tmp_path / "answers.jsonl").sentence()
    assert "features.safetensors was lost or altered" in said


def test_sets_of_a_trained_run_have_their_coverage(run: Path, tmp_path: Path) -> None:
    """Of 240 rows drawn alike, 39 at a time are held out: (39 + 1) 0.8 is whole, so that 0.8 is met and not passed."""
    rows = list(predictor_rows(run, write_texts(tmp_path, validation=240) / "validation.jsonl"))
    probs = average(Predictor(load_run(run), SETTINGS).log_probs(rows))
    labels = np.array([row.answer for row in rows])
    generator = np.random.default_rng(0)
    for kind in ("lac", "aps", "raps"):
        scores, bare, covered = row_scores(probs, rows, kind), [], []
        for _ in range(200):
            order = generator.permutation(240)
            held, new = order[:39], order[39:]
            found = set_thresholds(scores[held], labels[held], 0.8)
            bare.append((scores[new, labels[new]] <= found[0]).mean())
            covered.append(label_sets(probs.numpy()[new], scores[new], found)[np.arange(201), labels[new]].mean())
        assert np.mean(bare) == pytest.approx(0.8, abs=0.02)
        assert np.mean(covered) >= np.mean(bare)
