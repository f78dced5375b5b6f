"""Benchmark rows from the Hugging Face Hub through ``datasets.load_dataset``."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable

from scalabl.core.errors import UserError
from scalabl.data.assemble import part_examples
from scalabl.data.example import Example
from scalabl.data.registry import Benchmark, RawRow

REACH_SECONDS = 4.0  # how long the Hub may take to say that it is there


def offline() -> bool:
    """Whether the user switched the Hub off (``HF_HUB_OFFLINE`` or ``HF_DATASETS_OFFLINE``)."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def reachable(seconds: float = REACH_SECONDS) -> bool:
    """Whether the Hub answers within ``seconds``: tried first, because ``datasets`` retries for minutes."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # it answered, if not kindly
        except (OSError, ValueError):
            answers.append(False)

    # looking up a name has no timeout of its own, so it waits in a thread that may be left behind
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def official_splits(benchmark: Benchmark) -> dict[str, list[Example]]:
    """All rows of the official splits that ``benchmark`` is made of.

    Raises:
        UserError: the data set cannot be loaded, or its rows have another layout.
    """
    official: dict[str, list[Example]] = {}
    for split in benchmark.splits.values():
        official[split] = []
        for part in benchmark.parts:
            rows = _load(part.hub_id, part.hub_config, split)
            try:
                official[split] += part_examples(benchmark, part, split, rows)
            except (KeyError, TypeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{part.hub_id} ({part.hub_config}, {split}) has rows of another layout ({error!r}); "
                    f"run `scalabl data get {benchmark.name}` for the rows from the package registry."
                ) from None
    return official


def _load(hub_id: str, config: str, split: str) -> Iterable[RawRow]:
    import datasets  # half a second: late

    try:
        return datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # datasets raises errors of five libraries; each means: no rows
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{hub_id} ({config}, {split}) could not be loaded from the Hub ({type(error).__name__}: {first_line}); "
            "check the network, or get the rows from the package registry with `scalabl data get`."
        ) from None
