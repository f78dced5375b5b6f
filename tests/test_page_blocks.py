"""Every block of Python of the pages that are no tutorials is run: README and prompts here, the others in serving/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from page_blocks import ROOT, python_blocks, run_blocks
from program import short
from tiny_base import loaded, tiny_encoder, write_jsonl, write_texts
from transformers import Trainer, TrainingArguments

import scalabl
from scalabl.training.run import train

RUN = ["README.md", "docs/prompts.md", "docs/scaling.md", "docs/serving.md"]


def test_no_page_is_overlooked() -> None:
    """A page with Python is run here, beside the tests of its server, or by test_tutorials.py."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    found = {str(page.relative_to(ROOT)) for page in pages}
    assert {page for page in found if python_blocks(page)} == {*RUN, "docs/index.md"}


def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = write_texts(tmp_path / "texts")
    train(short(texts, model=str(tiny_encoder()), scoring="head", normalization="sum"), tmp_path / "run")
    base, tokenizer = loaded()
    ids = tokenizer(["a b c d", "d c b a"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    args = TrainingArguments(
        "trainer", max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    names: dict[str, Any] = {
        "base": base, "tokenizer": tokenizer, "ids": ids, "args": args, "Trainer": Trainer, "prompts": ["red"],
        "train": [{"input_ids": row, "labels": row} for row in ids] * 2,
    }  # fmt: skip
    instead = {"args, ...": "args, train_dataset=train", '"bad", "good"': '"yes", "no"'}
    made: Any = run_blocks("README.md", names, instead)
    assert made["answer"].label[0] in ("yes", "no") and made["answer"].epistemic[0] > 0
    assert (tmp_path / "out" / "mean" / "adapter_config.json").is_file()


def test_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"red stone {i}", "label": ("yes", "no")[i % 2]} for i in range(12)]
    write_jsonl(tmp_path / "tweets" / "train.jsonl", rows[:8])
    write_jsonl(tmp_path / "tweets" / "validation.jsonl", rows[8:])
    settings = {"scoring": "letters", "template": "Tweet: {text}\nSentiment:", "normalization": "sum"}
    train(short(tmp_path / "tweets", **settings), tmp_path / "run")
    made: Any = run_blocks("docs/prompts.md", {"scalabl": scalabl}, {'"positive"': '"yes"'})
    texts, labelled, prompts = (made["classifier"](each) for each in (
        ["what a day"], [{"text": "what a day", "label": "yes"}], [{"prompt": "Tweet: what a day\nSentiment:"}]
    ))  # fmt: skip
    assert texts.probs.tolist() == labelled.probs.tolist() == prompts.probs.tolist()
