"""Finished runs on one tiny base for a server: choices, label words, a head, texts; and an encoder's head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_base import tiny_base, tiny_encoder, write_jsonl, write_task, write_texts

from scalabl.runs.settings import Settings
from scalabl.training.run import train

WORDS = [f"{word} {i}" for i, word in enumerate(["red stone", "bee", "a blue ninety-nine of stone"] * 8)]


def served_runs(directory: Path) -> dict[str, Path]:
    """Their directories by name."""
    base = str(tiny_base(chat=True))
    words = [{"text": text, "label": ("yes", "no")[i % 2]} for i, text in enumerate(WORDS)]
    texts = [{"prompt": f"say {text}", "completion": text} for text in WORDS]
    for split, number in (("train", 24), ("validation", 12)):
        write_jsonl(directory / "words" / f"{split}.jsonl", words[:number])
        write_jsonl(directory / "texts" / f"{split}.jsonl", texts[:number])
    heads = write_texts(directory / "heads", validation=12)
    task = write_task(directory / "task")

    def run(name: str, data: Path, **own: Any) -> Path:
        settings = {
            "model": base, "data": str(data), "steps": 4, "batch_size": 4, "r": 4, "layers": "last:2",
            "validation_rows": 12, "learning_rate": 0.05, "init_sigma": 0.5,
        }  # fmt: skip
        train(Settings.flat(**settings | own), directory / name)
        return directory / name

    return {
        "choices": run("run-choices", task, scoring="continuation", normalization="token", validation_rows=4),
        "words": run("run-words", directory / "words", scoring="letters"),
        "plain": run("run-plain", directory / "words", scoring="letters", method="mle"),
        "head": run("run-head", heads, scoring="head"),
        "writer": run("run-writer", directory / "texts"),
        "encoder": run("run-encoder", heads, scoring="head", model=str(tiny_encoder())),
    }
