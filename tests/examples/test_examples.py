"""Every example does what its story says, on tiny models and a few rows."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_process
import pytest
import torch
from safetensors.torch import load_file
from tiny_base import as_json, questions, tiny_base, tiny_encoder, write_jsonl, write_texts

import scalabl
from scalabl.core.files import ADAPTER

EXAMPLES = Path(__file__).parents[2] / "examples"
Example = Callable[..., str]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Example:
    """`example("trl_sft", model, data, ...)` runs it into `tmp_path / "out"` and gives what it has printed."""

    others = subprocess.run

    def command(arguments: Any, **options: Any) -> Any:
        if arguments[1:3] != ["-m", "scalabl"]:  # a library's own question
            return others(arguments, **options)
        said = own_process.run(own_process.program, *arguments[3:])
        assert options == {"check": True} and said.returncode == 0, said.stderr
        print(said.stdout)
        return said

    monkeypatch.setattr(subprocess, "run", command)

    def run(name: str, model: Path, data: Path, *more: object) -> str:
        given = ("--model", model, "--data", data, "--output", tmp_path / "out", "--steps", 2, *more)
        monkeypatch.setattr(sys, "argv", [name, *map(str, given)])
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SCALABL_CACHE", str(tmp_path / "cache"))
        capfd.readouterr()
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{"text", "label"} rows of three labels."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of three choices."""
    directory = tmp_path_factory.mktemp("choices")
    for seed, split in enumerate(("train", "test")):
        write_jsonl(directory / f"{split}.jsonl", map(as_json, questions(12, choices=(3,), seed=seed)))
    return directory


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{"prompt", "chosen", "rejected"} rows."""
    rows = [
        {"prompt": f"{row.question} ", "chosen": row.choices[0], "rejected": row.choices[1]} for row in questions(8)
    ]
    return write_jsonl(tmp_path_factory.mktemp("preferences") / "rows.jsonl", rows)


def posterior_of(directory: Path) -> dict[str, torch.Tensor]:
    """The numbers of the posterior that an adapter was saved with, and that there is a plain LoRA beside it."""
    assert (directory / "mean" / ADAPTER).is_file()
    found = {name: value for name, value in load_file(directory / ADAPTER).items() if "posterior" in name}
    assert found and all(value.dtype == torch.float32 for value in found.values())
    return found


def test_every_example_is_short_and_named_by_the_readme() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert len(files) == 9
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 60, file.name
        assert f"python examples/{file.name}" in text.partition('"""\n\nimport')[0]
        assert f"examples/{file.name}" in readme
        for option in ("--model", "--data", "--output", "--steps"):
            assert f'"{option}"' in text, (file.name, option)


def test_trainer_classification(example: Example, texts: Path, tmp_path: Path) -> None:
    said = example("trainer_classification", tiny_encoder(), texts)
    assert re.search(r"^\d+ of 12 right$", said, re.MULTILINE) and said.count("epistemic") == 3
    posterior_of(tmp_path / "out")
    # another process needs the directory alone
    answer = scalabl.Classifier.from_pretrained(tmp_path / "out", samples=3)(["red", "blue"])
    assert set(answer.label) <= {"about red", "about blue", "about green"}


def test_bayesianize_existing(example: Example, texts: Path, tmp_path: Path) -> None:
    said = example("bayesianize_existing", tiny_encoder(), texts)
    assert re.search(r"^1[0-2] of 12 answers are the same$", said, re.MULTILINE), said
    before, after = map(float, re.search(r"mean epistemic: (\S+) -> (\S+) nats", said).groups())  # type: ignore[union-attr]
    assert before == 0 < after
    assert (tmp_path / "out" / "bayesian" / "scalabl.json").is_file()


def test_active_learning(example: Example, texts: Path, tmp_path: Path) -> None:
    said = example("active_learning", tiny_encoder(), texts, "--rounds", 2, "--label", 8)
    assert re.findall(r"round (\d): (\d+) labelled rows", said) == [("0", "8"), ("1", "16")]
    posterior_of(tmp_path / "out")


def test_trl_sft(example: Example, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = [{"prompt": f"{row.question} ", "completion": row.choices[0]} for row in questions(8)]
    said = example("trl_sft", tiny_base(), write_jsonl(tmp_path / "rows.jsonl", rows))
    doubts = [line for line in said.splitlines() if line.startswith("    epistemic: ")]
    assert len(doubts) == 3
    assert any(float(number) > 0 for line in doubts for number in re.findall(r" ([\d.e-]+)(?:,|$)", line))
    posterior_of(tmp_path / "out")


@pytest.mark.parametrize("trainer", ["DPO", "Reward", "GRPO"])
def test_trl_reward_or_dpo(example: Example, preferences: Path, tmp_path: Path, trainer: str) -> None:
    pytest.importorskip("trl")
    said = example("trl_reward_or_dpo", tiny_base(), preferences, "--trainer", trainer)
    if trainer == "GRPO":
        assert "refused: GRPO holds the probability of a generated text against another pass" in said
        assert not (tmp_path / "out" / ADAPTER).exists()
        return
    posterior_of(tmp_path / "out")
    if trainer == "Reward":
        spread = re.search(r"\+- \[([\d.e-]+), ([\d.e-]+)\]", said)
        assert spread and min(map(float, spread.groups())) > 0


def test_qlora_4bit(example: Example, choices: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    said = example("qlora_4bit", tiny_base(), choices)
    assert len(re.findall(r"^[ABC] at 0\.\d\d, epistemic \d\.\d{3}; right is [ABC]: ", said, re.MULTILINE)) == 12
    posterior_of(tmp_path / "out")


def test_vllm_particles(example: Example, choices: Path, tmp_path: Path) -> None:
    said = example("vllm_particles", tiny_base(), choices, "--particles", 3)
    assert f"vllm serve {tiny_base()} " in said and "particle-2=" in said
    for number in range(3):
        assert (tmp_path / "out" / "particles" / str(number) / ADAPTER).is_file()


def test_ray_batch(example: Example, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    said = example("ray_batch", tiny_encoder(), texts)
    assert "00000.jsonl: 12 rows, mean confidence" in said
    rows = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (tmp_path / "out/answers/00000.jsonl").read_text().splitlines()]
    assert len(answers) == len(rows) and all(0 < answer["confidence"] <= 1 for answer in answers)


def test_push_to_hub(example: Example, texts: Path, tmp_path: Path) -> None:
    said = example("push_to_hub", tiny_encoder(), texts)
    assert "peft, text-classification, on None: scalabl, lora, bayesian, uncertainty-quantification" in said
    assert "with scalabl: ['about" in said and "without: PeftModelForSequenceClassification of" in said
    posterior_of(tmp_path / "out-hub")
    assert "](reliability.svg)" in (tmp_path / "out-hub" / "README.md").read_text()
    assert (tmp_path / "out-hub" / "reliability.svg").is_file()
