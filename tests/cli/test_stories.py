"""Stories of a first hour as a user goes through them, command by command, with what is read at each step.

Four of eight are here. TRL and Trainer: `examples/trl_sft.py` and `test_stock_prompts.py`; an adapter that somebody
has: `docs/tutorials/existing-adapter.md`, run by `test_tutorials.py`; a classification head of another trainer:
`test_stock_heads.py`; a cluster: `examples/ray_batch.py`, run by `test_examples.py`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import AutoPeftModelForSequenceClassification
from program import Output, Program
from tiny_base import tiny_base, tiny_encoder, write_jsonl, write_texts
from transformers import AutoTokenizer

from scalabl import Classifier

TEXTS = ["red stone bee", "a long answer blue", "wide open green"]
STEP = ("--rank", 4, "--learning-rate", 0.02, "--layers", "last:2")


def words(said: Output) -> str:
    """What is read, without the ends of lines; the command did its work."""
    assert said.code == 0, said.err
    return " ".join(said.out.split())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of rows, and a base in a place of its own."""
    directory = write_texts(tmp_path_factory.mktemp("desk"), train=240)
    (directory / "train.jsonl").rename(directory / "tickets.jsonl")
    for name in ("validation", "test"):
        (directory / f"{name}.jsonl").unlink()
    shutil.copytree(tiny_encoder(), directory / "base")
    return directory / "tickets.jsonl"


@pytest.fixture
def desk(tickets: Path, program: Program, tmp_path: Path) -> Path:
    """A folder of one's own with rows, base and a run on them; what training said is in run.txt."""
    shutil.copytree(tickets.parent, tmp_path / "desk")
    desk = tmp_path / "desk"
    said = program(
        "train", "--model", desk / "base", "--data", desk / "tickets.jsonl", "--output", desk / "run",
        "--steps", 20, *STEP,
    )  # fmt: skip
    (desk / "run.txt").write_text(words(said))
    return desk


def test_rows_of_ones_own(desk: Path, program: Program) -> None:
    run, trained = desk / "run", (desk / "run.txt").read_text()
    assert "216 trained on, 24 held out" in trained and "calibrated" in trained
    judged = words(program("evaluate", run, "--report", desk / "report.html"))
    assert "24 rows" in judged and "it was fitted on these very rows" in judged
    assert (desk / "report.html").stat().st_size > 10_000
    new = write_jsonl(desk / "new.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
    words(program("predict", run, "--input", new, "--output", desk / "answers.jsonl", "--predictive", "mc"))
    answers = read(desk / "answers.jsonl")
    assert [answer["text"] for answer in answers] == TEXTS
    # the same rows in Python, as they are in the file
    same = Classifier.from_pretrained(run, predictive="mc")(TEXTS)
    np.testing.assert_allclose([list(answer["probs"].values()) for answer in answers], same.probs, atol=1e-5)
    assert [answer["label"] for answer in answers] == list(same.label)
    refused = program("predict", run, "--input", new, "--output", desk / "sure.jsonl", "--max-error", 0.05).sentence()
    assert "24" in refused and "held" in refused  # how many rows there are, and where more are to be put


def test_the_settings_are_chosen_by_what_the_run_says(desk: Path, program: Program) -> None:
    """The warning about sigma is the same wherever it is read, and goes away when it is followed."""
    told = re.compile(r"sigma was still (?:rising|falling) .*? train with ((?:--[a-z-]+ [0-9.]+ ?)+)")
    given: dict[str, str] = {"--steps": "20"}
    run, trained, followed = desk / "run", (desk / "run.txt").read_text(), 0
    while (found := told.search(trained)) is not None and followed < 3:
        said = found[0].rstrip(".;")
        assert said in words(program("inspect", run))
        assert said in words(program("evaluate", run, "--predictive", "mean"))
        options = shlex.split(found[1].rstrip(" .;"))
        given |= dict(zip(options[::2], (value.rstrip(".") for value in options[1::2]), strict=True))
        followed += 1
        run = desk / f"run {followed}"
        trained = words(
            program(
                "train", "--model", desk / "base", "--data", desk / "tickets.jsonl", "--output", run, *STEP,
                *(part for pair in given.items() for part in pair),
            )
        )  # fmt: skip
    assert followed == 1 and "sigma was still" not in trained, (given, trained)
    assert "the noise is larger than the mean" not in trained
    assert "sigma was still" not in words(program("inspect", run))


def test_a_run_is_handed_to_a_colleague(desk: Path, program: Program, tmp_path: Path) -> None:
    new = write_jsonl(desk / "new.jsonl", [{"text": text} for text in TEXTS])
    words(program("predict", desk / "run", "--input", new, "--output", desk / "before.jsonl", "--predictive", "mc"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("run", "new.jsonl"):
        shutil.move(desk / name, theirs / name)
    shutil.move(desk / "base", theirs / "encoder")
    arguments = ("predict", theirs / "run", "--input", theirs / "new.jsonl", "--output", theirs / "after.jsonl")
    lost = program(*arguments, "--predictive", "mc").sentence()
    assert str(desk / "base") in lost and "--model" in lost
    words(program(*arguments, "--predictive", "mc", "--model", theirs / "encoder"))
    before, after = read(desk / "before.jsonl"), read(theirs / "after.jsonl")
    assert [answer["label"] for answer in before] == [answer["label"] for answer in after]
    np.testing.assert_allclose(*([a["confidence"] for a in answers] for answers in (before, after)), atol=1e-6)
    for directory in (theirs / "run", theirs / "run" / "mean"):
        card = (directory / "README.md").read_text(encoding="utf-8")
        assert (
            "trained on 216 " in card
            and "`about red`" in card
            and "rows of tickets.jsonl" in card
            and "/desk" not in card
        )
    # without scalabl, PEFT loads the LoRA of the mean
    tokenizer = AutoTokenizer.from_pretrained(theirs / "encoder")
    config = json.loads((theirs / "run" / "mean" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    config["base_model_name_or_path"] = str(theirs / "encoder")
    (theirs / "run" / "mean" / "adapter_config.json").write_text(json.dumps(config))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(theirs / "run" / "mean", num_labels=3).eval()
    logits = plain(**tokenizer(TEXTS[0], return_tensors="pt")).logits
    raw = Classifier.from_pretrained(theirs / "run", model=str(theirs / "encoder"), predictive="mean", raw=True)
    np.testing.assert_allclose(logits.softmax(dim=-1).detach().numpy(), raw(TEXTS[:1]).probs, atol=1e-4)


def test_a_plan_says_what_fits_and_is_trained_so(program: Program, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"red {i}", "label": "ab"[i % 2]} for i in range(60)])
    arguments: tuple[object, ...] = ("--model", tiny_base(layers=6), "--rank", 4)
    at = ("--seq", 256, "--batch", 16)
    said = words(program("plan", *arguments, *at, "--card", "24GB"))
    assert "fits: " in said
    tight = words(program("plan", *arguments, *at, "--card", "30MB"))
    advised = re.search(r"do this: (--[a-z-]+(?: [a-z0-9:]+)?) \(", tight)
    assert advised is not None, tight
    change = shlex.split(advised[1])
    planned = dict(zip(map(str, at[::2]), at[1::2], strict=True))
    planned = {"--seq": 256} | {k: v for k, v in planned.items() if k not in change} if change else planned
    said = words(program("plan", *arguments, *(x for pair in planned.items() for x in pair), *change, "--card", "30MB"))
    assert "fits: " in said
    trained = words(
        program("train", *arguments, "--data", rows, "--output", tmp_path / "run", "--steps", 2, "--batch-size", 4)
    )
    assert "memory: about" in trained and "54 trained on, 6 held out" in trained
    exported = words(program("export", tmp_path / "run", "--particles", 2, "--output", tmp_path / "served"))
    assert "vllm serve" in exported and "particle-1=" in exported
