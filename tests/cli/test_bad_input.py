"""Bad rows, settings and models of `train`: one sentence that names the mend, exit code 2, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import Program, train_arguments
from tiny_base import tiny_base, write_jsonl

ROW = {"question": "which?", "choices": ["red", "blue"], "answer": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "does not exist; give a .jsonl file"),
        ([], "is empty; write one JSON object a line"),
        ([{"question": "which?", "choices": ["red", "blue"]}], '"answer"'),
        ([ROW | {"answer": 2}], "outside"),
        ([ROW | {"answer": "green"}], "none of the choices"),
        ([ROW | {"choices": ["red"]}], "only one choice"),
        ([ROW | {"choices": ["red", "red"]}], "there twice"),
        ([{"text": "a", "label": "yes"}, {"text": "b", "label": "Yes"}], "there twice (or in two spellings)"),
        ([{"text": "a", "label": "yes"}, {"text": "b", "label": "yes"}], "only one label"),
        ([{"text": "a", "label": "yes"}, {"text": "b"}], '"label"'),
        ([{"text": "a", "label": "yes"}, ROW], "one kind of row"),
        ([[1, 2]], "not a JSON object"),
    ],
)
def test_rows(program: Program, tmp_path: Path, rows: list[Any] | None, message: str) -> None:
    data = tmp_path / "rows.jsonl"
    if rows is not None:
        write_jsonl(data, rows)
    output = tmp_path / "run"
    assert message in program(*train_arguments(data, output)).sentence()
    assert not output.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-modules", "query"), "target_modules names query, but this model has down_proj, gate_proj"),
        (("--rank", 33), r"r is 33, but model.layers.0.self_attn"),
        (("--prior-std", 0), "prior_std is 0.0; it must be a positive number"),
        (("--prior-std", -1), "prior_std is -1.0; it must be a positive number"),
        (("--layers", "last:9"), "layers is last:9, but the model has 3; lower it"),
        (("--layers", "some"), "it must be all or last:K"),
        (("--chat",), "leave out --chat"),
        (("--max-length", 3), "raise --max-length"),
        (("--steps", "few"), "Invalid value for '--steps'"),
        (("--stpes", 3), "No such option"),
        (("--rank", "large"), "see scalabl train --help."),
        (("--data", "arc-eazy"), "arc-easy"),
        (("--model", "minilm"), "There is no model minilm; did you mean minilm-l6?"),
        (("--model", "./nowhere"), "There is no model directory ./nowhere"),
        (("--bits", 3), "bits is 3; it must be 4, 8 or left out"),
        (("--dtype", "float8"), "must be one of auto, float32, bfloat16, float16"),
        (("--json", "/nowhere/record.json"), "give a file in a directory that exists"),
        (("--config", "nowhere.yaml"), "There is no recipe nowhere.yaml"),
    ],
)
def test_settings(program: Program, rows: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    output = tmp_path / "run"
    assert message in program(*train_arguments(rows, output, *options)).sentence()
    assert not output.exists()


def test_a_label_of_several_tokens(program: Program, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": f"w{i}", "label": ("yes", "maybe")[i % 2]} for i in range(12)]
    )
    output = tmp_path / "run"
    sentence = program(*train_arguments(data, output, "--scoring", "letters")).sentence()
    assert "'maybe' is 2 tokens" in sentence and "--scoring continuation" in sentence
    assert not output.exists()
    assert program(*train_arguments(data, output)).code == 0  # auto finds the scoring that works


def without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncated(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_language_model(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "vit", "architectures": ["ViTModel"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "has no tokenizer; save it there with tokenizer.save_pretrained"),
        (without_config, "cannot be loaded"),
        (without_weights, "cannot be loaded"),
        (truncated, "cannot be loaded"),
        (no_language_model, "cannot be loaded"),
    ],
)
def test_model_directories(
    program: Program, rows: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_base(), model)
    damage(model)
    output = tmp_path / "run"
    sentence = program(*train_arguments(rows, output, "--model", model)).sentence()
    assert message in sentence and str(model) in sentence
    assert not output.exists()


def test_a_hub_name_with_a_dot_is_no_missing_directory(
    program: Program, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sentence = program(*train_arguments(rows, tmp_path / "run", "--model", "Qwen/Qwen2.5-0.5B")).sentence()
    assert "no model directory" not in sentence and "Qwen/Qwen2.5-0.5B cannot be loaded" in sentence
