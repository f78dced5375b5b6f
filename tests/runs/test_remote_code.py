"""Python code that a model's files name is run where the user has typed so, and nowhere else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from program import Program
from tiny_base import tiny_base

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.remote_code import allow_remote_code, reading_model
from scalabl.generation.equivalence import Entailment
from scalabl.runs.models import load_base, load_tokenizer, read_config, saved_tokenizer
from scalabl.scoring.images import _reader

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast
open({mark!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(LlamaTokenizerFast):
    pass
class OwnProcessor:
    pass
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model of an architecture that only its own file knows; the file leaves `mark` beside the directory."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    directory = tmp_path / "base"
    shutil.copytree(tiny_base(), directory)
    (directory / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")), encoding="utf-8")
    change(directory / "config.json", model_type="own_llama", architectures=["OwnModel"], auto_map={
        "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel",
        "AutoModelForSequenceClassification": "own.OwnModel", "AutoModel": "own.OwnModel",
    })  # fmt: skip
    return directory


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | values), encoding="utf-8")


def own_tokenizer(directory: Path) -> None:
    auto_map = {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    change(directory / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)


def own_processor(directory: Path) -> None:
    auto_map = {"AutoImageProcessor": "own.OwnProcessor"}
    change(directory / "preprocessor_config.json", image_processor_type="OwnProcessor", auto_map=auto_map)


WAYS: dict[str, Callable[[Path], object]] = {
    "model": lambda base: load_base(str(base)),
    "tokenizer": lambda base: load_tokenizer(str(base)),
    "configuration": lambda base: read_config(str(base)),
    "tokenizer beside an adapter": saved_tokenizer,
    "image processor": lambda base: _reader(str(base), None, None),
    "entailment": lambda base: Entailment.load(str(base)),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_answer_on_a_terminal_allows_it(way: str, own_code: Path) -> None:
    own_tokenizer(own_code)
    own_processor(own_code)
    with pytest.raises(UserError, match=r"scalabl --trust-remote-code COMMAND") as caught:
        WAYS[way](own_code)
    assert "\n" not in str(caught.value)
    assert not (own_code.parent / "mark").exists()


@pytest.mark.parametrize("command", ["train", "plan"])
def test_commands_name_the_option(command: str, own_code: Path, task_directory: Path, program: Program) -> None:
    data = ("--data", task_directory, "--output", own_code.parent / "run") if command == "train" else ()
    said = program(command, "--model", own_code, *data)
    assert said.code == 2 and "scalabl --trust-remote-code COMMAND" in said.err and said.err.count("\n") == 1
    assert not (own_code.parent / "mark").exists()


def test_it_is_run_where_the_user_has_typed_so(
    own_code: Path, monkeypatch: pytest.MonkeyPatch, program: Program
) -> None:
    said = program("--trust-remote-code", "data", "list")
    assert said.code == 0
    monkeypatch.delenv("SCALABL_TRUST_REMOTE_CODE", raising=False)
    monkeypatch.setenv("SCALABL_TRUST_REMOTE_CODE", "0")
    allow_remote_code()
    model, _ = load_base(str(own_code))
    assert type(model).__name__ == "OwnModel"
    assert (own_code.parent / "mark").exists()


def test_every_loader_of_transformers_is_told() -> None:
    """A loader that is left to its default asks on the terminal."""
    root, silent = Path(scalabl.__file__).parent, []
    loader = re.compile(r"(?:Auto\w+|auto|kind)\.from_(?:pretrained|config)\(")
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for found in loader.finditer(text):
            depth, end = 1, found.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            if "trust_remote_code=" not in text[found.end() : end]:
                silent.append(f"{path}: {text[found.start() : end]}")
    assert silent == []


def test_whatever_fails_on_a_model_s_files_is_one_sentence() -> None:
    for error in (Exception("no variant\nof it"), KeyError("x"), ZeroDivisionError(), RecursionError("deep")):
        with (
            pytest.raises(UserError, match="^The model m cannot be loaded: [^\n]+$"),
            reading_model("The model m cannot be loaded"),
        ):
            raise error
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), UserError("Own.")):
        with pytest.raises(type(error)) as caught, reading_model("The model m cannot be loaded"):
            raise error
        assert caught.value is error
