"""MMLU's questions by subject: the packaged rows, and the rule by which one official split becomes three."""

from collections import Counter

from scalabl.data import Example, find, load_task
from scalabl.data.assemble import assemble
from scalabl.data.registry import IN_SCOPE, OUT_OF_SCOPE


def test_packaged_subjects_are_balanced_and_no_text_stands_in_two_splits(tmp_path):
    task = load_task("mmlu-subjects", cache_dir=tmp_path, source="package")
    others = load_task("mmlu-other-subjects", cache_dir=tmp_path, source="package")
    counts = {split: set(Counter(row.answer for row in rows).values()) for split, rows in task.splits.items()}
    assert counts == {"train": {20}, "validation": {15}, "test": {40}}
    assert {split: len(rows) for split, rows in others.splits.items()} == {"test": 400}
    assert len(task.labels) == 20 and len(others.labels) == 10 and not set(task.labels) & set(others.labels)
    texts = Counter(row.question.casefold() for rows in task.splits.values() for row in rows)
    assert set(texts.values()) == {1}
    for row in task.split("test"):
        # the id has the subject, so a label that slipped would show
        assert row.choices[row.answer].replace(" ", "_") == row.id.rsplit("-", 2)[0]
    assert not set(IN_SCOPE) & set(OUT_OF_SCOPE)


def test_one_split_becomes_three_by_class_whatever_the_order():
    benchmark = find("mmlu-subjects")
    labels = benchmark.labels
    rows = [Example(f"{labels[a]}-test-{i}", f"{labels[a]} {i}", labels, a) for a in (0, 1) for i in range(80)]
    twice = [Example("a-test-99", "Which is true?", labels, 0), Example("b-test-99", "Which is TRUE?", labels, 1)]
    made = assemble(benchmark, {"test": [*rows, *twice]})
    assert {split: Counter(row.answer for row in of) for split, of in made.items()} == {
        "train": {0: 20, 1: 20}, "validation": {0: 15, 1: 15}, "test": {0: 40, 1: 40},
    }  # fmt: skip
    assert not any("rue?" in row.question for of in made.values() for row in of)
    assert assemble(benchmark, {"test": [*twice, *reversed(rows)]}) == made
