"""Every command on rows that may have several labels, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from program import Program
from tiny_base import _WORDS, tiny_base, tiny_encoder, write_jsonl, write_texts

from scalabl import Classifier
from scalabl.core.files import ADAPTER
from scalabl.data import load_task
from scalabl.inference.calibrate import calibration_at_the_end
from scalabl.inference.predictor import Predictor, labels_of
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics import evaluate
from scalabl.metrics.uncertainty import average
from scalabl.runs.loading import load_run
from scalabl.runs.method import load_post_hoc
from scalabl.runs.settings import Settings
from scalabl.training.run import Calibrating, train

OPTIONS = ("--steps", 10, "--rank", 4, "--learning-rate", 0.02, "--layers", "last:2", "--batch-size", 8)
LABELS = ("about blue", "about green", "about red")


def write_several(directory: Path) -> Path:
    """A directory of {"text", "labels"} rows: a text has the label of each word in it, or none."""
    for seed, (split, number) in enumerate((("train", 40), ("validation", 24), ("test", 14))):
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(number):
            words = [_WORDS[int(j)] for j in torch.randint(3, len(_WORDS), (2 + i % 3,), generator=generator)]
            found = [label for j, label in enumerate(LABELS) if i % 8 >> j & 1]
            words += [label.removeprefix("about ") for label in found]
            rows.append({"text": f"{' '.join(words)} {i}", "labels": found})
        write_jsonl(directory / f"{split}.jsonl", rows)
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_several(tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A finished run; not to be changed."""
    output = tmp_path_factory.mktemp("runs") / "run"
    _trained(texts, output, calibration_at_the_end)
    return output


def _trained(texts: Path, output: Path, calibrate: Calibrating | None = None, **changes: object) -> None:
    settings: dict[str, Any] = {
        "model": str(tiny_encoder()), "data": str(texts), "steps": 30, "batch_size": 8, "r": 4, "layers": "last:2",
        "learning_rate": 0.02,
    }  # fmt: skip
    train(Settings.flat(**settings | changes), output, calibrate=calibrate)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_it_is_trained_judged_and_inspected(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "scalabl.json").read_text())
    assert record["scoring"]["scoring"] == "head" and record["scoring"]["several"] is True
    assert record["class_counts"] == dict.fromkeys(LABELS, 20) and record["calibration"]["rows"] == 24
    other = write_texts(tmp_path / "other") / "test.jsonl"
    judged = program(
        "evaluate", run, "--data", texts, "--predictive", "mc", "--samples", 4, "--ood", other,
        "--json", tmp_path / "judged.json", "--report", tmp_path / "report.html",
    )  # fmt: skip
    assert judged.code == 0, judged.err
    assert "14 rows, each of 3 labels a question" in judged.out and "macro-F1" in judged.out
    assert "calibrated" in judged.out
    found = json.loads((tmp_path / "judged.json").read_text())

    rows = load_task(str(texts)).split("test")
    predictor = Predictor(load_run(run), PredictionSettings("mc", 4, raw=True))
    log_probs, answers = predictor.log_probs(rows), labels_of(rows)
    assert log_probs.shape == (4, 42, 2) and answers.shape == (42,)
    direct = evaluate(average(log_probs), answers, per_row=3)
    for name, metric in direct.items():
        assert found[name]["value"] == pytest.approx(metric.value, abs=1e-5)
        assert found[name]["low"] == pytest.approx(metric.low, abs=1e-4)
    assert (found["n"], found["labels_per_row"]) == (14, 3) and found["ood"][str(other)]["n"] == 12
    probs = average(log_probs)[:, 1].view(14, 3).numpy()
    marks = answers.view(14, 3).numpy()
    exact = ((probs > 0.5) == (marks == 1)).all(axis=1).mean()
    assert found["sets"]["subset_accuracy"]["value"] == pytest.approx(exact)
    assert [each["support"] for each in found["per_class"]] == marks.sum(axis=0).tolist()
    assert set(found["ood"][str(other)]["scores"]) == {"probability", "entropy", "epistemic", "energy", "distance"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The labels of a row together" in page
    assert any(f"not {label}" in page for label in LABELS)  # rows of which labels depends on the trained numbers
    assert program("inspect", run, "--variance").code == 0
    planned = program("plan", "--model", tiny_encoder(), "--labels", 3)
    assert planned.code == 0


@pytest.mark.parametrize("predictive", ["mean", "mc", "linearized", "auto"])
def test_rows_are_answered_alike_by_the_command_and_in_python(
    program: Program, run: Path, tmp_path: Path, predictive: str
) -> None:
    given = ["red and blue", "a stone", "green"]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in given])
    output = tmp_path / "answers.jsonl"
    options = ("--predictive", predictive, "--samples", 4, "--batch-size", 2)
    said = program("predict", run, "--input", rows, "--output", output, *options)
    assert said.code == 0, said.err
    answers = read(output)
    python = Classifier.from_pretrained(run, predictive=predictive, samples=4)(given)
    assert python.label == [] and python.labels is not None
    np.testing.assert_allclose([list(a["probs"].values()) for a in answers], python.probs, atol=1e-5)
    for answer, probs, labels in zip(answers, python.probs, python.labels, strict=True):
        assert "label" not in answer and tuple(answer["probs"]) == LABELS
        assert answer["labels"] == labels == [label for label, p in zip(LABELS, probs, strict=True) if p > 0.5]
        assert answer["confidence"] == pytest.approx(np.maximum(probs, 1 - probs).prod(), abs=1e-5)
        p = np.float64(probs)
        assert answer["entropy"] == pytest.approx(-(p * np.log(p) + (1 - p) * np.log(1 - p)).sum(), abs=1e-4)
        assert answer["entropy"] == pytest.approx(answer["aleatoric"] + answer["epistemic"], abs=1e-6)
        assert "distance" in answer
    assert predictive == "mean" or max(a["epistemic"] for a in answers) > 0
    assert python.particle_log_probs.shape[1:] == (3, 3)


def test_thresholds_answer_null_for_whole_rows(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    rows, output = texts / "test.jsonl", tmp_path / "answers.jsonl"
    common = ("predict", run, "--input", rows, "--output", output, "--predictive", "mc", "--samples", 3)
    program(*common)
    plain = read(output)
    bar = sorted(answer["confidence"] for answer in plain)[7]
    assert program(*common, "--abstain", bar).code == 0
    assert [a["labels"] is None for a in read(output)] == [answer["confidence"] < bar for answer in plain]
    said = program(*common, "--max-error", 0.6, "--guarantee", "conformal")
    assert said.code == 0 and "threshold" in said.out and "of 24 held-out rows" in said.out, said.err
    said = program(*common, "--max-false-alarms", 0.3)
    assert said.code == 0, said.err
    assert {answer["reason"] for answer in read(output)} <= {None, "out of scope"}

    def refused(*more: object) -> str:
        return program(*common[:-4], *more).sentence()

    of_one = "is about the one right label of a row, and rows of this run may have several; leave it out."
    assert refused("--coverage", 0.9) == f"--coverage {of_one}"
    assert refused("--adaptive") == f"--adaptive {of_one}"
    (tmp_path / "priors.json").write_text(json.dumps(dict.fromkeys(LABELS, 1 / 3)))
    assert refused("--priors", tmp_path / "priors.json") == f"--priors {of_one}"


def test_a_pool_is_ranked_by_the_sum_over_labels(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    pool = texts / "test.jsonl"
    ranking = ("acquire", pool, run, "--output", tmp_path / "ranked.jsonl", "-k", 4, "--samples", 4)
    ranked = program(*ranking, "--by", "bald")
    assert ranked.code == 0, ranked.err
    rows = load_task(str(texts)).split("test")
    log_probs = Predictor(load_run(run), PredictionSettings("mc", 4, raw=True)).log_probs(rows)
    p = log_probs.double().exp()[..., 1].view(4, 14, 3)
    bits = [-(x * x.log() + (1 - x) * (1 - x).log()).sum(dim=-1) for x in (p.mean(dim=0), p)]
    bald = bits[0] - bits[1].mean(dim=0)
    best = bald.topk(4)
    found = read(tmp_path / "ranked.jsonl")
    assert [row["text"] for row in found] == [rows[i].question for i in best.indices.tolist()]
    assert [row["score"] for row in found] == pytest.approx(best.values.tolist(), abs=1e-5)
    program(*ranking)  # the margin: how far each label is from one half
    margins = -(2 * p.mean(dim=0) - 1).abs().sum(dim=-1)
    scores = [row["score"] for row in read(tmp_path / "ranked.jsonl")]
    assert scores == pytest.approx(margins.topk(4).values.tolist(), abs=1e-5)


def test_a_run_is_calibrated_anew_and_goes_on_to_the_same_bytes(
    program: Program, texts: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    said = program("calibrate", copy, "--data", texts / "validation.jsonl", "--samples", 4)
    assert said.code == 0 and "24 rows" in said.out, said.err

    data = tmp_path / "data"
    shutil.copytree(texts, data)
    begun = ("train", "--model", tiny_encoder(), "--data", data, "--output", tmp_path / "again", *OPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr("scalabl.training.run.whole_adapter", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert program(*begun, "--save-steps", 5).code == 130
    kept = {path.name: path.read_text() for path in data.iterdir()}
    for name, text in kept.items():  # the same labels, one a row
        rows = [json.loads(line) for line in text.splitlines()]
        made = [{"text": row["text"], "label": (row["labels"] or LABELS[:1])[0]} for row in rows]
        write_jsonl(data / name, made)
    said = program(*begun, "--save-steps", 5).sentence()
    assert "was begun with other numbers of labels a row, with which a head of these cannot go on" in said
    for name, text in kept.items():
        (data / name).write_text(text)
    assert program(*begun, "--save-steps", 5).code == 0
    whole = ("train", "--model", tiny_encoder(), "--data", data, "--output", tmp_path / "whole", *OPTIONS)
    assert program(*whole, "--save-steps", 5).code == 0
    assert (tmp_path / "whole" / ADAPTER).read_bytes() == (tmp_path / "again" / ADAPTER).read_bytes()


def test_rows_of_the_other_kind_are_refused(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "red", "label": label} for label in LABELS])
    said = program("evaluate", run, "--data", one).sentence()
    assert said.startswith('Row one:1 has one "label", but the run has several "labels" a row; write it so')
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [{"text": "red", "labels": ["about red", "about stones"]}])
    said = program("evaluate", run, "--data", unseen).sentence()
    assert "the label 'about stones' is none of 'about blue', 'about green', 'about red'; mend the label" in said
    begun = ("train", "--model", tiny_base(), "--data", texts, "--output", tmp_path / "x", "--steps", 1)
    said = program(*begun, "--scoring", "letters").sentence()
    assert 'have several "labels" each, which only a classification head learns; leave out --scoring.' in said
    said = program(*begun, "--class-weights", "balanced").sentence()
    assert said == "class_weights weigh rows by their one label, and here rows have several; leave them out."
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"text": "red", "labels": []}] * 3)
    said = program("train", "--model", tiny_base(), "--data", empty, "--output", tmp_path / "x").sentence()
    assert said.endswith('no row has a label, every "labels" is empty; give rows that have some.')
    assert not (tmp_path / "x").exists()


def test_a_decoder_takes_a_head_for_them(texts: Path, tmp_path: Path) -> None:
    _trained(texts, tmp_path / "run", model=str(tiny_base()), steps=1)
    scoring = json.loads((tmp_path / "run" / "scalabl.json").read_text())["scoring"]
    assert (scoring["scoring"], scoring["several"]) == ("head", True)


def test_distances_are_to_the_rows_of_each_label(run: Path, texts: Path) -> None:
    """A row counts for each of its labels, one without any for a class of its own."""
    predictor = Predictor(load_run(run), PredictionSettings("mean", raw=True))
    rows = list(load_task(str(texts)).split("train"))
    assert predictor.distance is not None
    scorer = predictor.run.scorer
    from scalabl.predictive import predict
    from scalabl.scoring.features import MeanPass

    mean_pass = MeanPass(scorer.model)
    features = predict(scorer, predictor.run.encode(rows), mean_pass)[0, :, 1:]
    means = [
        features[[i for i, row in enumerate(rows) if label in (row.answers or ())]].mean(dim=0) for label in range(3)
    ]
    means.append(features[[i for i, row in enumerate(rows) if not row.answers]].mean(dim=0))
    torch.testing.assert_close(predictor.distance.means, torch.stack(means), atol=1e-3, rtol=1e-3)
    assert predictor.distance.shares.tolist() == pytest.approx([20 / 65] * 3 + [5 / 65])


@pytest.mark.parametrize("method", ["mle", "mc_dropout", "blob", "ivon", "monteclora"])
def test_trained_baselines(texts: Path, tmp_path: Path, method: str) -> None:
    if method == "ivon":
        pytest.importorskip("ivon")
    _trained(texts, tmp_path / "run", method=method, steps=4, lora_dropout=0.1 if method == "mc_dropout" else 0.0)
    answer = Classifier.from_pretrained(tmp_path / "run", samples=3)(["red and blue", "a stone"])
    assert answer.probs.shape == (2, 3) and answer.labels is not None
    assert np.isfinite(answer.probs).all() and (answer.probs.sum(axis=1) != 1).all()


def test_methods_that_are_fitted(texts: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        _trained(texts, tmp_path / f"{seed}", method="mle", seed=seed)
    task = load_task(str(texts))
    train_rows, validation, test = (list(task.split(name)) for name in ("train", "validation", "test"))
    plain = Predictor(load_run(tmp_path / "0"), PredictionSettings(raw=True)).log_probs(test)
    for name in ("temperature", "ensemble", "laplace", "tfb", "last_layer_laplace", "subspace_laplace"):
        method = load_post_hoc(name)
        members = [tmp_path / "1"] if name == "ensemble" else []
        facts = method.fit(load_run(tmp_path / "0"), train_rows, validation, members=members)
        log_probs = Predictor(load_run(tmp_path / "0"), PredictionSettings(method=name, samples=4)).log_probs(test)
        assert log_probs.shape[1:] == (42, 2)
        probs = average(log_probs)
        assert (probs - average(plain)).abs().max() > 1e-4, name
        if name == "temperature":  # T of each label's logit
            z = plain[0, :, 1] - plain[0, :, 0]
            torch.testing.assert_close(probs[:, 1].float(), (z / facts["temperature"]).sigmoid(), atol=1e-4, rtol=1e-4)


def test_a_run_is_made_bayesian(program: Program, texts: Path, tmp_path: Path) -> None:
    _trained(texts, tmp_path / "plain", method="mle")
    output = program("bayesianize", tmp_path / "plain", "--data", texts, "--output", tmp_path / "laplace")
    assert output.code == 0, output.err
    answer = Classifier.from_pretrained(tmp_path / "laplace", samples=4, raw=True)(["red and blue", "a stone"])
    assert answer.labels is not None and answer.epistemic.max() > 0
