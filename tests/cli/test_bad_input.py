"""Bad input: one sentence that names the mend, exit code 2, no traceback, nothing left behind."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Program
from safetensors.torch import load_file, save_file
from tiny_base import as_json, questions, tiny_base, write_jsonl

from scalabl.cli.main import explain
from scalabl.errors import UserError

ROW = {"question": "which?", "choices": ["red", "blue"], "answer": 0}


def train_arguments(data: object, output: Path, *more: object) -> tuple[object, ...]:
    return ("train", "--model", tiny_base(), "--data", data, "--output", output, "--steps", 2, "--rank", 4, *more)


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


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", map(as_json, questions(20)))


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
        (("--data", "arc-eazy"), "arc-easy"),
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


@pytest.mark.parametrize("name", ["log_mean", "direction", "lora_B"])
def test_an_adapter_without_a_record_that_lacks_weights(
    program: Program, tmp_path: Path, scalabl_run: Path, name: str
) -> None:
    from scalabl.classifier import Classifier

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
        (("--predictive", "laplace"), "it must be mean or mc"),
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


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from scalabl.cli import main
del sys.argv[1]
main()
"""


@pytest.mark.parametrize("bytes_a_file", [3_000, 20_000])
def test_writes_that_fail_leave_nothing_half_written(rows: Path, tmp_path: Path, bytes_a_file: int) -> None:
    # a file may not become larger than that: the adapter of the first checkpoint, or its optimiser state
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN and resource.RLIMIT_FSIZE is not None
    output = tmp_path / "run"
    arguments = [str(word) for word in train_arguments(rows, output)]
    cache = {"SCALABL_CACHE": str(tmp_path / "cache")}
    said = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(bytes_a_file), *arguments],
        capture_output=True, text=True, env={**os.environ, **cache},
    )  # fmt: skip
    assert said.returncode == 2, said.stderr
    (line,) = said.stderr.splitlines()
    assert line.startswith("scalabl: ") and ("disk" in line)
    assert not output.exists()


class _Full(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device", "/data/run/scalabl.json")


def test_a_full_disk_a_read_only_one_and_memory_are_named_with_their_mend(
    program: Program, rows: Path, tmp_path: Path, scalabl_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise _Full

    with monkeypatch.context() as patch:
        patch.setattr("scalabl.training.run._fit", fail)
        sentence = program(*train_arguments(rows, tmp_path / "run")).sentence()
    assert sentence.startswith("/data/run/scalabl.json: the disk is full; free some space")
    assert not (tmp_path / "run").exists()

    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()):

        def scarce(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("scalabl.predictive.monte_carlo.MonteCarloPredictive._chunk", scarce)
            sentence = program("evaluate", scalabl_run, "--data", rows).sentence()
        assert sentence.startswith("Out of memory; lower --batch-size")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x: the file system is read-only; choose"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission was denied; choose"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up; free"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "A checkpoint could"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "Out of memory"),
        (UserError("Do this."), "Do this."),
    ],
)
def test_errors_of_libraries_become_sentences(error: Exception, start: str) -> None:
    sentence = explain(error)
    assert sentence is not None and sentence.startswith(start) and sentence.endswith(".")


def test_bugs_are_no_users_business() -> None:
    for error in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOENT, "No"),
        KeyError("x"),
    ):
        assert explain(error) is None


def test_allocating_too_much_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert str(explain(caught.value)).startswith("Out of memory")
