"""Qwen-VL and Gemma 3 trained, saved, loaded and asked with images; and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_text import draw, image_text_base, rows
from peft import PeftModel
from program import Program
from tiny_base import tiny_base, write_task

from scalabl.core.errors import UserError
from scalabl.data import Example, load_task
from scalabl.inference.classifier import Classifier
from scalabl.inference.predictor import log_probabilities
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Letters, Scorer
from scalabl.scoring.images import image_reader
from scalabl.training.run import train


def settings_of(architecture: str, images: Path, **changes: Any) -> Settings:
    settings: dict[str, Any] = {
        "model": str(image_text_base(architecture)), "data": str(images), "steps": 30, "batch_size": 6, "r": 4,
        "scoring": "letters", "learning_rate": 1e-2, "save_steps": 100, "max_length": 200,
    }  # fmt: skip
    return Settings.flat(**{**settings, **changes})


@pytest.fixture(scope="module")
def run(architecture: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("runs") / "run"
    train(settings_of(architecture, images), output)
    return load_run(output)


def test_a_run_is_trained_saved_and_loaded(run: Run, architecture: str, images: Path) -> None:
    assert run.directory is not None
    log = json.loads((run.directory / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    found = log_probabilities(run, rows(images), run.predictive("mc", samples=5))
    again = log_probabilities(load_run(run.directory), rows(images), run.predictive("mc", samples=5))
    assert torch.equal(found, again)
    assert found.exp().std(dim=0).amax() > 1e-3, "one model, not several"
    mean = log_probabilities(run, rows(images), run.predictive("mean"))
    base, _ = load_base(str(image_text_base(architecture)))
    plain = PeftModel.from_pretrained(base, str(run.directory / "mean")).eval()
    expected = predict(Scorer(plain, run.scoring), run.encode(rows(images)), MeanPredictive())
    assert (mean.exp() - expected.exp()).abs().max() < 1e-5


def test_an_answer_depends_on_the_image(run: Run, images: Path, tmp_path: Path) -> None:
    classifier = Classifier.from_pretrained(run.directory, samples=5, predictive="mc", batch_size=3)  # type: ignore[arg-type]
    red, blue = draw(tmp_path / "red.png", "red"), draw(tmp_path / "blue.png", "blue")
    row = {"question": "which colour is it?", "choices": ["red", "blue", "green"]}
    asked = [row | {"image": str(path)} for path in (red, blue, red)] + [row]
    answer = classifier(asked)
    probs = answer.probs
    assert np.allclose(probs[0], probs[2], atol=1e-6), "the same image"
    assert np.abs(probs[0] - probs[1]).max() > 1e-3 and np.abs(probs[0] - probs[3]).max() > 1e-3
    assert (answer.epistemic > 0).all()
    every = classifier(rows(images))
    expected = log_probabilities(run, rows(images), run.predictive("mc", samples=5))
    assert np.allclose(np.exp(every.particle_log_probs), expected.exp().numpy(), atol=1e-5)


def test_continuation_is_trained_with_checkpointing(architecture: str, images: Path, tmp_path: Path) -> None:
    made = settings_of(architecture, images, scoring="continuation", steps=3, gradient_checkpointing=True, chat=True)
    record = train(made, tmp_path / "run")
    assert record.scoring["scoring"] == "continuation"
    found = log_probabilities(load_run(tmp_path / "run"), rows(images), MonteCarloPredictive(3))
    assert found.shape == (3, 9, 4) and found.exp().sum(dim=-1).allclose(torch.ones(3, 9), atol=1e-5)


def test_images_are_read_on_a_4_bit_base(architecture: str, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    train(settings_of(architecture, images, steps=2, bits=4), tmp_path / "run")
    made = load_run(tmp_path / "run")
    weight = made.scorer.model.get_submodule("base_model.model.model.language_model.layers.0.mlp.down_proj").weight
    assert type(weight).__name__ == "Params4bit"
    found = log_probabilities(made, rows(images), MonteCarloPredictive(4)).exp()
    assert found.std(dim=0).amax() > 1e-5 and found.sum(dim=-1).allclose(torch.tensor(1.0))


def test_the_commands_read_image_rows(run: Run, images: Path, tmp_path: Path, program: Program) -> None:
    figures, answers = tmp_path / "figures.json", tmp_path / "answers.jsonl"
    arguments = ("--predictive", "mc", "--samples", 4)
    assert program("evaluate", run.directory, "--data", images, *arguments, "--json", figures).code == 0
    assert json.loads(figures.read_text())
    given = ("--input", images / "test.jsonl", "--output", answers)
    assert program("predict", run.directory, *given, *arguments).code == 0
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    expected = log_probabilities(run, rows(images), run.predictive("mc", samples=4)).exp().mean(dim=0)
    assert [answer["id"] for answer in written] == [row.id for row in rows(images)]
    for answer, row in zip(written, expected, strict=True):
        assert list(answer["probs"].values()) == pytest.approx(row[: len(answer["probs"])].tolist(), abs=1e-5)


def test_a_model_without_an_image_side_refuses_image_rows(images: Path, tmp_path: Path) -> None:
    made = settings_of("gemma3", images, model=str(tiny_base()))
    with pytest.raises(UserError, match=r"The rows have images, but .* \(llama\) reads text alone"):
        train(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_longer_than_a_row_may_be_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Row train0 takes \d+ tokens with its images.*raise --max-length"):
        train(settings_of("qwen3_vl", images, max_length=30), tmp_path / "run")


def test_a_text_that_holds_image_marks_is_refused(images: Path) -> None:
    _, tokenizer = load_base(str(image_text_base("qwen3_vl")))
    row = rows(images)[0]
    bad = Example("x", "see <|image_pad|> here", row.choices, 0, row.images)
    with pytest.raises(UserError, match=r"Row x has 1 images, but 2 marks <\|image_pad\|> in its prompt"):
        Letters(tokenizer, num_letters=4).encode(bad)


def test_a_lost_image_processor_is_named(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(image_text_base("gemma3"), directory)
    (directory / "preprocessor_config.json").unlink()
    _, tokenizer = load_base(str(directory))
    with pytest.raises(UserError, match="The image processor of .* cannot be loaded"):
        image_reader(tokenizer)


def test_rows_of_text_go_on_working_in_an_image_text_model(architecture: str, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    train(settings_of(architecture, task, steps=2, scoring="auto"), tmp_path / "run")
    made = load_run(tmp_path / "run")
    text = list(load_task(str(task)).split("test"))
    assert log_probabilities(made, text, MonteCarloPredictive(2)).exp().sum(dim=-1).allclose(torch.tensor(1.0))
