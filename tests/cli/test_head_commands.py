"""Every command on a classification head: an encoder is trained, resumed, judged and read; what it cannot is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_bases import classifier_on, own_probs
from peft import PeftModel
from program import Program
from safetensors.torch import load_file
from tiny_base import _WORDS, tiny_base, tiny_encoder, write_jsonl, write_task, write_texts

from scalabl import Classifier
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, FEATURES
from scalabl.serving.manifest import read_manifest, vllm_command
from scalabl.serving.vllm import VLLMClassifier

OPTIONS = ("--steps", 20, "--rank", 4, "--learning-rate", 0.02, "--layers", "last:2", "--batch-size", 8)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def run(program: Program, texts: Path, tmp_path: Path) -> Path:
    output = program("train", "--model", tiny_encoder(), "--data", texts, "--output", tmp_path / "run", *OPTIONS)
    assert output.code == 0, output.err
    assert "head" in output.out and "of the head" in output.out
    return tmp_path / "run"


def test_every_command_reads_a_head(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    judged = program("evaluate", run, "--data", texts, "--json", tmp_path / "judged.json")
    assert judged.code == 0, judged.err
    found = json.loads((tmp_path / "judged.json").read_text())
    assert "nll" in json.dumps(found)
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, [{"text": "red yes"}, {"text": "a blue stone that is wide open"}])
    predicted = program("predict", run, "--input", rows, "--output", tmp_path / "answers.jsonl")
    assert predicted.code == 0, predicted.err
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(answer["probs"]) for answer in answers] == [{"about red", "about blue", "about green"}] * 2
    python = Classifier.from_pretrained(run)(["red yes", {"text": "a blue stone that is wide open"}])
    for answer, probs in zip(answers, python.probs.tolist(), strict=True):
        assert list(answer["probs"].values()) == pytest.approx(probs, abs=1e-5)
    asked = [json.loads(line)["text"] for line in (texts / "test.jsonl").read_text().splitlines()]
    labels = Classifier.from_pretrained(run)(asked).label  # rows labelled as the model has them, so that it is right
    assert len(set(labels)) > 1
    own = [{"text": text, "label": label} for text, label in zip(asked, labels, strict=True)] * 2
    right = program("evaluate", run, "--data", write_jsonl(tmp_path / "own.jsonl", own))
    below = " ".join(right.out.split("half the 95% bootstrap interval", 1)[1].split())
    assert "is right on 100.0 % of 24 rows, where guessing is right on 33.3 %" in below, right
    ranked = program("acquire", rows, run, "--output", tmp_path / "ranked.jsonl", "-k", 2)
    assert ranked.code == 0, ranked.err
    assert program("inspect", run).code == 0
    planned = program("plan", "--model", tiny_encoder(), "--labels", 3, "--json", tmp_path / "plan.json")
    assert planned.code == 0 and "3 labels" in planned.out, planned.err
    assert json.loads((tmp_path / "plan.json").read_text())["loss"] == "head"


def test_a_resumed_run_ends_with_the_same_bytes(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    again = program("train", "--model", tiny_encoder(), "--data", texts, "--output", tmp_path / "again", *OPTIONS)
    assert again.code == 0, again.err
    assert (run / ADAPTER).read_bytes() == (tmp_path / "again" / ADAPTER).read_bytes()
    assert (run / FEATURES).read_bytes() == (tmp_path / "again" / FEATURES).read_bytes()
    assert any("classifier" in name for name in load_file(run / ADAPTER))


def test_what_a_head_cannot_have_is_refused(program: Program, texts: Path, run: Path, tmp_path: Path) -> None:
    questions = write_task(tmp_path / "questions")
    said = program("train", "--model", tiny_encoder(), "--data", questions, "--output", tmp_path / "x").sentence()
    assert "is an encoder, whose classification head needs rows" in said
    said = program(
        "train", "--model", tiny_encoder(), "--data", texts, "--output", tmp_path / "x", "--scoring", "letters"
    ).sentence()
    assert "is an encoder, which has no letters" in said
    said = program(
        "train", "--model", tiny_base(), "--data", questions, "--output", tmp_path / "x", "--scoring", "head"
    ).sentence()
    assert "scoring is head" in said
    assert not (tmp_path / "x").exists()
    assert program("evaluate", run, "--data", questions / "test.jsonl").code == 2
    said = program("generate", run, "--prompt", "red").sentence()
    assert "a classification head, which writes no text; use scalabl predict" in said


def test_particles_are_classifiers_of_stock_peft(program: Program, run: Path, tmp_path: Path) -> None:
    """Each with the trained head; vLLM does not serve an encoder's, so that no line is printed that would."""
    exported = program("export", run, "--particles", 3, "--output", tmp_path / "out", "--raw")
    assert exported.code == 0, exported.err
    assert (
        "vLLM loads no adapter with the classification head of an encoder" in exported.out
        and "vllm serve" not in exported.out
    )
    manifest = read_manifest(tmp_path / "out")
    with pytest.raises(UserError, match="vLLM loads no adapter with the classification head of an encoder"):
        vllm_command(manifest, tmp_path)
    with pytest.raises(UserError, match="vLLM loads no adapter with the classification head of an encoder"):
        VLLMClassifier.from_export(tmp_path / "out")
    texts = ["red is w1 w2", "blue", "w3 green w4 w5"]
    found = [
        own_probs(PeftModel.from_pretrained(classifier_on(tiny_encoder()), str(particle)).eval(), texts)
        for particle in (tmp_path / "out" / "particles" / str(k) for k in range(3))
    ]
    ours = Classifier.from_pretrained(run, predictive="mc", samples=3, raw=True)(texts)
    np.testing.assert_allclose(torch.stack(found), np.exp(ours.particle_log_probs), atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_labels_of_several_tokens_are_a_decoder_s_head(program: Program, texts: Path, tmp_path: Path) -> None:
    output = program("train", "--model", tiny_base(), "--data", texts, "--output", tmp_path / "run", *OPTIONS)
    assert output.code == 0, output.err
    record = json.loads((tmp_path / "run" / "scalabl.json").read_text())
    assert record["scoring"]["scoring"] == "head" and record["parameters"]["head"] == 32 * 3


def test_pairs_of_texts_are_trained_on_judged_and_answered(program: Program, tmp_path: Path) -> None:
    pairs = [(a, b) for a in ("red", "blue", "green") for b in ("red", "blue", "green")]
    rows = [{"text": a, "text_pair": b, "label": "yes" if a == b else "no"} for a, b in pairs] * 3
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    output = program("train", "--model", tiny_encoder(), "--data", data, "--output", tmp_path / "run", *OPTIONS)
    assert output.code == 0, output.err
    run = tmp_path / "run"
    assert json.loads((run / "scalabl.json").read_text())["scoring"]["pairs"] is True
    unlabelled = write_jsonl(tmp_path / "rows.jsonl", [{"text": a, "text_pair": b} for a, b in pairs])
    predicted = program("predict", run, "--input", unlabelled, "--output", tmp_path / "answers.jsonl")
    assert predicted.code == 0, predicted.err
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    python = Classifier.from_pretrained(run)([{"text": a, "text_pair": b} for a, b in pairs])
    for answer, probs in zip(answers, python.probs.tolist(), strict=True):
        assert list(answer["probs"].values()) == pytest.approx(probs, abs=1e-5)
    assert python.probs[:, 0].std() > 0  # the second text is read
    single = write_jsonl(tmp_path / "single.jsonl", [{"text": "red"}])
    said = program("predict", run, "--input", single, "--output", tmp_path / "x.jsonl").sentence()
    assert said == ('Row single:1 has no "text_pair", but the run was trained on pairs of texts; give it one.')
    said = program(
        "train", "--model", tiny_base(), "--data", data, "--output", tmp_path / "x", "--scoring", "letters"
    ).sentence()
    assert 'has a "text_pair", which only a classification head reads' in said and not (tmp_path / "x").exists()
    of_base = program(
        "train", "--model", tiny_base(), "--data", data, "--output", tmp_path / "decoder", "--steps", 1, "--rank", 4
    )
    assert of_base.code == 0 and "scoring     head" in of_base.out, of_base.err


def test_a_max_length_beyond_the_model_s_positions_is_refused(program: Program, texts: Path, tmp_path: Path) -> None:
    said = program(
        "train", "--model", tiny_encoder(), "--data", texts, "--output", tmp_path / "x", "--max-length", 513
    ).sentence()
    assert said == "max_length is 513, but this bert has learnt positions for 512 tokens; give --max-length 512."
    assert not (tmp_path / "x").exists()


def _answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_class_weights_are_corrected_to_the_training_rows_and_to_other_priors(program: Program, tmp_path: Path) -> None:
    # what a text says is nothing, so that the labels' frequencies are all that can be learnt
    labels = ["often"] * 17 + ["seldom"] * 3
    rows = [{"text": f"{_WORDS[i % 3]} {i}", "label": label} for i, label in enumerate(labels * 4)]
    data = tmp_path / "data"
    write_jsonl(data / "train.jsonl", rows)
    write_jsonl(data / "validation.jsonl", rows[:20])
    run, more = tmp_path / "run", ("--class-weights", "balanced", "--weight-decay", 0.5)
    options = ("--steps", 40, "--rank", 4, "--learning-rate", 3e-3, "--layers", "last:1", "--batch-size", 40)
    output = program("train", "--model", tiny_encoder(), "--data", data, "--output", run, *options, *more)
    assert output.code == 0, output.err
    record = json.loads((run / "scalabl.json").read_text())
    assert record["class_counts"] == {"often": 68, "seldom": 12}
    weights = record["scoring"]["class_weights"]
    assert weights == pytest.approx({"often": 80 / 136, "seldom": 80 / 24})

    write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in rows[:20]])
    answers: dict[str, list[float]] = {}
    for name, priors in {
        "own": None, "same": {"often": 0.85, "seldom": 0.15}, "even": {"seldom": 0.5, "often": 0.5},
        "off": {"often": 0.5, "seldom": 0.4},
    }.items():  # fmt: skip
        given: list[object] = []
        if priors is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(priors))
            given = ["--priors", tmp_path / f"{name}.json"]
        out = tmp_path / f"{name}.jsonl"
        said = program("predict", run, "--input", tmp_path / "rows.jsonl", "--output", out, "--samples", 4, *given)
        if name == "off":
            assert said.sentence().startswith("The priors sum to 0.9; write probabilities that sum to 1")
            continue
        assert said.code == 0, said.err
        answers[name] = [answer["probs"]["seldom"] for answer in _answers(out)]
    assert 0.05 < sum(answers["own"]) / 20 < 0.3  # 0.15, and 0.5 without the correction
    assert answers["same"] == pytest.approx(answers["own"], abs=1e-5)
    assert 0.35 < sum(answers["even"]) / 20 < 0.65
    mean = Classifier.from_pretrained(run, samples=0)
    even = Classifier.from_pretrained(run, samples=0, priors={"often": 0.5, "seldom": 0.5})
    p, shifted = (each([row["text"] for row in rows[:20]]).probs[:, 1] for each in (mean, even))
    assert shifted.tolist() == pytest.approx((p / 0.15 / (p / 0.15 + (1 - p) / 0.85)).tolist(), abs=1e-5)

    promised = ("--max-error", 0.4, "--priors", tmp_path / "even.json")
    said = program("predict", run, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "x.jsonl", *promised)
    assert "a rate is promised under those of the run's own rows" in said.sentence()
    judged = program("evaluate", run, "--data", data / "validation.jsonl", "--priors", tmp_path / "even.json")
    assert judged.code == 0, judged.err


def test_class_weights_are_refused_without_a_head_and_with_other_labels(
    program: Program, texts: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"about red": 1, "about blue": 2}))
    begun = ("train", "--model", tiny_encoder(), "--data", texts, "--output", tmp_path / "x", *OPTIONS)
    said = program(*begun, "--class-weights", weights).sentence()
    assert said.endswith("has no weight for 'about green'; write one for every label.")
    questions = write_task(tmp_path / "questions")
    said = program(
        "train", "--model", tiny_base(), "--data", questions, "--output", tmp_path / "x", "--class-weights", "balanced"
    ).sentence()
    assert said == "class_weights is balanced, which is of a classification head; leave it out."
    assert not (tmp_path / "x").exists()


def test_a_run_goes_on_with_its_own_labels_alone(
    program: Program, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "own"
    shutil.copytree(texts, data)
    run = ("train", "--model", tiny_encoder(), "--data", data, "--output", tmp_path / "run", *OPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr("scalabl.training.run.whole_adapter", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert program(*run, "--save-steps", 10).code == 130
    train = data / "train.jsonl"
    train.write_text(train.read_text() + json.dumps({"text": "stone", "label": "about stones"}) + "\n")
    said = program(*run, "--save-steps", 10).sentence()
    assert "was begun with other labels, with which a head of these cannot go on; restore the files" in said
    train.write_text(train.read_text().replace("about stones", json.loads(train.read_text().split("\n")[0])["label"]))
    said = program(*run, "--save-steps", 10).sentence()
    assert "was begun with other training rows, and would go on as another run; restore the files" in said
