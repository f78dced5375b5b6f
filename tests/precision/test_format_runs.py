"""`scalabl train`, `evaluate`, `predict` and `Classifier` with the base in every format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats import FORMATS, Format, saved_base
from peft import PeftModel
from tiny_base import questions, write_task

from scalabl.core.errors import UserError
from scalabl.inference.classifier import Classifier
from scalabl.inference.predictor import log_probabilities
from scalabl.predictive import predict
from scalabl.runs.directory import claim
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.models import load_base, quantization_config
from scalabl.runs.record import RunRecord
from scalabl.runs.settings import Settings
from scalabl.scoring import Scorer
from scalabl.study.plan import LATER
from scalabl.training.run import train


def settings_of(task: Path, form: Format, **changes: Any) -> Settings:
    settings: dict[str, Any] = {
        "model": str(saved_base()), "data": str(task), "steps": 40, "batch_size": 4, "r": 4, "scoring": "letters",
        "validation_rows": 4, "learning_rate": 2e-2, "layers": "last:2", "save_steps": 100,
    }  # fmt: skip
    return Settings.flat(**{**settings, **form.held, **changes})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def run(form: Format, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on the format, with the trunk of the lowest layer stored, and loaded again."""
    cache = pytest.MonkeyPatch()
    cache.setenv("SCALABL_CACHE", str(tmp_path_factory.mktemp("cache")))
    output = tmp_path_factory.mktemp("runs") / "run"
    train(settings_of(task, form), output)
    yield load_run(output)  # type: ignore[misc]
    cache.undo()


def weight_of(run: Run) -> Any:
    layer = run.scorer.model.get_submodule("base_model.model.model.layers.2.self_attn.q_proj")
    return layer.get_base_layer().weight


def test_the_base_is_held_as_the_recipe_says_while_training_and_after(form: Format, run: Run) -> None:
    bits, library = form.held.get("bits"), form.held.get("quantization", "bitsandbytes")
    kinds = {(8, "bitsandbytes"): "Int8Params", (4, "bitsandbytes"): "Params4bit", (8, "torchao"): "Int8Tensor"}
    assert type(weight_of(run)).__name__ == kinds.get((bits, library), "Parameter")
    assert run.record.recipe["quantization"] == library
    assert run.scorer.model.get_input_embeddings().weight.dtype == getattr(torch, form.held["dtype"])
    # 4-bit tensors hold two numbers an element; they are counted as numbers
    assert run.record.parameters["base"] == 150_720
    assert run.scorer.trunk is not None and run.scorer.trunk.depth == 1


def test_training_lowers_the_loss(form: Format, run: Run) -> None:
    assert run.directory is not None
    log = json.loads((run.directory / "training_log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) >= 8 and np.mean(losses[-3:]) < 0.85 * np.mean(losses[:3])
    sigma = [entry["elbo/sigma_mean"] for entry in log if "elbo/sigma_mean" in entry]
    assert sigma[0] != sigma[-1]


def test_particles_disagree_and_the_classifier_has_the_answers_of_evaluate(run: Run) -> None:
    rows = questions(9, seed=2)
    found = log_probabilities(run, rows, run.predictive("mc", samples=6))
    classifier = Classifier.from_pretrained(run.directory, samples=6, predictive="mc")  # type: ignore[arg-type]
    answer = classifier(rows)
    assert np.allclose(np.exp(answer.particle_log_probs), found.exp().numpy(), atol=1e-5)
    assert found.exp().std(dim=0).amax() > 0.01, "one model, not several"
    assert (answer.epistemic > 0).all()
    linearised = log_probabilities(run, rows, run.predictive("linearized"))
    gap = (linearised.exp().mean(dim=0) - found.exp().mean(dim=0)).abs().max()
    assert gap < 0.25 and linearised.exp().std(dim=0).amax() > 0.01


def test_the_mean_is_the_plain_lora_of_mean_on_the_same_format(form: Format, run: Run) -> None:
    assert run.directory is not None
    rows = questions(9, seed=2)
    mean = log_probabilities(run, rows, run.predictive("mean"))
    base, _ = load_base(str(saved_base()), **form.held)
    plain = PeftModel.from_pretrained(base, str(run.directory / "mean")).eval()
    assert not any("posterior" in name for name, _ in plain.named_parameters())
    expected = predict(Scorer(plain, run.scoring), run.encode(rows), run.predictive("mean"))
    assert (mean.exp() - expected.exp()).abs().max() <= max(1e-5, form.rounding)


def test_a_run_can_be_made_bayesian_on_its_format(form: Format, task: Path, tmp_path: Path) -> None:
    from scalabl.training.posthoc.run import bayesianize
    from scalabl.training.posthoc.settings import read_source, rows_for, settings_for

    train(settings_of(task, form, method="mle", steps=4), tmp_path / "mle")
    source = read_source(tmp_path / "mle", None)
    settings = settings_for(source, str(task))
    made, wanted = settings.training.machine, settings_of(task, form).machine
    assert (made.dtype, made.bits, made.quantization) == (wanted.dtype, wanted.bits, wanted.quantization)
    bayesianize(source, *rows_for(source, str(task), 8), tmp_path / "bayes", settings)
    run = load_run(tmp_path / "bayes")
    assert type(weight_of(run)).__name__ != "Parameter" or "bits" not in form.held
    assert log_probabilities(run, questions(4), run.predictive("mc", samples=3)).isfinite().any()


def test_records_from_before_the_setting_are_of_bitsandbytes(tmp_path: Path) -> None:
    older = {name: value for name, value in Settings.flat(bits=8).as_dict().items() if name != "quantization"}
    (tmp_path / "scalabl.json").write_text(json.dumps({"recipe": older, "status": "running"}))
    assert RunRecord.read(tmp_path).base_options == {"dtype": "auto", "bits": 8, "quantization": "bitsandbytes"}
    assert claim(tmp_path, Settings.flat(bits=8)) is False
    with pytest.raises(UserError, match="quantization was bitsandbytes, now torchao"):
        claim(tmp_path, Settings.flat(bits=8, quantization="torchao"))
    assert "quantization" in LATER, "addresses of cells from before stay theirs"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantization": "gptq"}, "quantization is 'gptq'; it must be one of bitsandbytes, torchao"),
        ({"quantization": "torchao"}, "quantization is torchao, but bits is left out.*set bits to 8"),
        ({"quantization": "torchao", "bits": 4}, "quantization is torchao, but it holds 8 bit here; set bits to 8"),
        ({"bits": 3}, "bits is 3; it must be 4, 8 or left out"),
    ],
)
def test_what_there_is_not_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Settings.flat(**settings)


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torchao"):
        quantization_config("torchao", 8, torch.float32)


def test_4_bit_weights_are_not_packed_by_a_pass_that_only_predicts() -> None:
    """bitsandbytes' packed product has no gradient: what follows a first evaluation could not be trained."""
    model, _ = load_base(str(saved_base()), **FORMATS[3].held)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        model(input_ids=ids)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer(embedded).sum().backward()
    assert embedded.grad is not None and embedded.grad.abs().sum() > 0
