"""Official rows -> the splits of a Task: the same rules whatever the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scalabl.tasks.example import Example, check
from scalabl.tasks.holdout import holdout, shuffled
from scalabl.tasks.normalise import RawRow
from scalabl.tasks.registry import Benchmark, Part

SUBSET_SEED = 0
VALIDATION_FRACTION = 0.1  # of the train rows, at most 500, where the official validation serves as test

Splits = dict[str, tuple[Example, ...]]


def part_examples(benchmark: Benchmark, part: Part, split: str, rows: Iterable[RawRow]) -> list[Example]:
    """Normalise the raw rows of one official split of one part, in their order."""
    named = ((f"{part.prefix}{split}-{index}", row) for index, row in enumerate(rows))
    return [check(benchmark.normaliser(row, name), f"{benchmark.name} {name}") for name, row in named]


def assemble(benchmark: Benchmark, official: Mapping[str, list[Example]]) -> Splits:
    """Splits of a benchmark from its official ones.

    - A row whose question and choices stand in a later split too (train < validation < test) is dropped from the
      earlier one: two of ARC-Easy's train rows, six of MMLU college physics' eleven validation rows.
    - WinoGrande-S and -M take their train rows as a seeded subset of XL, S within M.
    - Where the official validation serves as test, 10 % (at most 500) as many rows as there are train rows
      become ``"validation"``: from XL's unused rows for WinoGrande, off the train rows otherwise.

    Args:
        benchmark: the table row.
        official: official split name -> all its rows.
    """
    splits: Splits = {}
    later: set[tuple[str, tuple[str, ...]]] = set()
    for name in ("test", "validation", "train"):
        if name in benchmark.splits:
            rows = official[benchmark.splits[name]]
            splits[name] = tuple(row for row in rows if _prompt(row) not in later)
            later.update(map(_prompt, rows))
    if "train" not in splits:
        return {"validation": splits["validation"], "test": splits["test"]}
    train = splits["train"]
    if benchmark.train_rows is not None:
        count = benchmark.train_rows
        order = shuffled(train, SUBSET_SEED)
        held = min(500, round(VALIDATION_FRACTION * count))
        chosen, rest = {row.id for row in order[:count]}, {row.id for row in order[count : count + held]}
        splits["validation"] = tuple(row for row in train if row.id in rest)
        train = tuple(row for row in train if row.id in chosen)
    elif benchmark.carves_validation:
        train, splits["validation"] = holdout(train, VALIDATION_FRACTION, SUBSET_SEED)
    return {"train": train, "validation": splits["validation"], "test": splits["test"]}


def _prompt(row: Example) -> tuple[str, tuple[str, ...]]:
    return row.question, row.choices
