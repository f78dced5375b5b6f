"""Bad runs, base models and places of the commands that read a run: one sentence, exit code 2, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from program import Program, train_arguments
from safetensors.torch import load_file, save_file
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord, config_digest

COMMANDS: dict[str, tuple[str, ...]] = {
    "evaluate": ("--data", "{rows}"),
    "predict": ("--input", "{rows}", "--output", "{output}"),
}


def read(program: Program, command: str, run: Path, rows: Path, tmp_path: Path, *more: object) -> str:
    """The sentence of a command that reads a run, which has to leave no file behind."""
    output = tmp_path / "answers.jsonl"
    before = set(tmp_path.rglob("*"))
    options = [text.format(rows=rows, output=output) for text in COMMANDS[command]]
    sentence = program(command, run, *options, *more).sentence()
    assert set(tmp_path.rglob("*")) == before
    return sentence


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("method", ["scalabl", "mle"])
def test_another_base_model(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path, mle_run: Path, command: str, method: str
) -> None:
    run = scalabl_run if method == "scalabl" else mle_run
    for other in (tiny_base(seed=1), tiny_base("qwen3"), tiny_base(layers=2)):
        sentence = read(program, command, run, rows, tmp_path, "--model", other)
        assert "another base model" in sentence and "fingerprint" in sentence
    moved = tmp_path / "moved"
    shutil.copytree(tiny_base(), moved)
    assert program("evaluate", run, "--data", rows, "--model", moved, "--samples", 1).code == 0


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)


def removed(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [cut, altered, removed])
@pytest.mark.parametrize("command", [*COMMANDS, "inspect"])
def test_damaged_adapters(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path, command: str, damage: Callable[[Path], None]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scalabl_run, run)
    damage(run / "adapter_model.safetensors")
    sentence = (
        program("inspect", run).sentence() if command == "inspect" else read(program, command, run, rows, tmp_path)
    )
    assert "adapter_model.safetensors" in sentence and ("restore" in sentence or "made by" in sentence)


def test_an_altered_configuration_is_refused_and_an_older_record_has_no_digest_of_it(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(scalabl_run, run)
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    moved = {**config, "base_model_name_or_path": "elsewhere"}
    (run / "adapter_config.json").write_text(json.dumps(moved), encoding="utf-8")  # in another layout too
    assert RunRecord.read_finished(run).config_sha256 == config_digest(run) == config_digest(scalabl_run)
    (run / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 16000}), encoding="utf-8")
    for command in COMMANDS:
        sentence = read(program, command, run, rows, tmp_path)
        assert "adapter_config.json was altered" in sentence and "restore the file" in sentence
    record = json.loads((run / "scalabl.json").read_text(encoding="utf-8"))
    del record["config_sha256"]
    (run / "scalabl.json").write_text(json.dumps(record), encoding="utf-8")
    assert RunRecord.read_finished(run).config_sha256 is None
    (run / "adapter_config.json").unlink()
    assert "holds no adapter_config.json" in program("inspect", run).sentence()


@pytest.mark.parametrize("name", ["log_mean", "direction", "lora_B"])
def test_an_adapter_without_a_record_that_lacks_weights(
    program: Program, tmp_path: Path, scalabl_run: Path, name: str
) -> None:
    from scalabl.inference.classifier import Classifier

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(scalabl_run / "adapter_config.json", adapter)
    tensors = load_file(scalabl_run / "adapter_model.safetensors")
    save_file({k: v for k, v in tensors.items() if name not in k}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lacks weights"):
        Classifier.from_pretrained(adapter, labels=["A", "B"])
    assert "altered" in program("inspect", adapter).sentence()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--predictive", "laplace"), "it must be mean, mc or linearized"),
        (("--samples", 0), "--samples is 0; it must be at least 1"),
        (("--batch-size", 0), "--batch-size is 0"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_settings_of_predictions(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path, command: str, options: Any, message: str
) -> None:
    assert message in read(program, command, scalabl_run, rows, tmp_path, *options)


def test_places_of_output_are_refused_before_any_work(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path, mle_run: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("/proc/answers", tmp_path / "no" / "such", tmp_path, tmp_path / "file" / "x"):
        assert "cannot be written" in program("predict", scalabl_run, "--input", rows, "--output", place).sentence()
        for option in ("--json", "--report"):
            assert "cannot be written" in program("evaluate", scalabl_run, "--data", rows, option, place).sentence()
        assert "cannot be written" in program("inspect", scalabl_run, "--json", place).sentence()
    for place in ("/proc/run", tmp_path / "file" / "x"):
        assert "cannot be written" in program(*train_arguments(rows, Path(place))).sentence()
    assert "is a file" in program(*train_arguments(rows, tmp_path / "file")).sentence()
    assert "holds another run" in program(*train_arguments(rows, mle_run)).sentence()
    assert "not empty and holds no run" in program(*train_arguments(rows, tmp_path)).sentence()
    assert "--abstain is 2.0" in read(program, "predict", scalabl_run, rows, tmp_path, "--abstain", 2)
    assert "without a posterior" in read(program, "predict", mle_run, rows, tmp_path, "--predictive", "mc")
    assert "Only ScalaBL" in read(program, "predict", mle_run, rows, tmp_path, "--predictive", "linearized")


def test_runs_that_are_none(program: Program, rows: Path, tmp_path: Path, scalabl_run: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(scalabl_run, broken)
    (broken / "scalabl.json").write_text('{"recipe": ')
    for run, message in (
        (tmp_path / "nowhere", "There is no run directory"),
        (tmp_path / "empty", "holds no scalabl.json"),
        (broken, "not readable JSON"),
    ):
        for command in COMMANDS:
            assert message in read(program, command, run, rows, tmp_path)
    assert "holds no adapter_config.json" in program("inspect", tmp_path / "empty").sentence()
    (tmp_path / "empty" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "not the configuration of a ScalaBL or LoRA adapter" in program("inspect", tmp_path / "empty").sentence()


def test_rows_with_more_choices_than_letters_leave_no_answer_half_written(
    program: Program, rows: Path, tmp_path: Path
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", map(as_json, questions(12, choices=(3,))))
    run = tmp_path / "run"
    assert program(*train_arguments(few, run, "--scoring", "letters")).code == 0
    assert "has 4 choices, but this scoring was made for 3" in read(program, "predict", run, rows, tmp_path)
