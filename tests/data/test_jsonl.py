"""The user's own rows: what is read, and that each bad row is refused with its place and its mend."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalabl.core.errors import UserError
from scalabl.data import Example, load_rows, load_task
from scalabl.data.class_balance import label_counts
from scalabl.data.jsonl import row_of, stream_rows
from scalabl.data.load import rows_of, shifted_rows
from scalabl.data.store import read_task, write_task

QUESTION = {"question": "What is wet?", "choices": ["fire", "water", "sand"], "answer": "water"}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["fire", "water", "sand"], "water", 1),
        (["fire", "water", "sand"], " water ", 1),
        (["fire", "water", "sand"], "C", 2),
        (["fire", "water", "sand"], 0, 0),
        (["1", "2", "3"], "2", 1),  # the text, not the index
        (["0", "1"], 1, 1),  # index and text say the same
        (["A", "B"], "B", 1),  # letter and text say the same
        (["7", "8", "9"], 2, 2),  # no choice is called 2
    ],
)
def test_answer_is_text_letter_or_index(tmp_path, choices, answer, index):
    path = write(tmp_path / "own.jsonl", {"question": "Which?", "choices": choices, "answer": answer})
    assert load_rows(path) == (Example("own:1", "Which?", tuple(choices), index),)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "earth"}, "none of the choices"),
        ({"answer": "D"}, "none of the choices"),
        ({"answer": "1"}, "without quotes"),
        ({"answer": 3}, "outside the choices"),
        ({"answer": -1}, "outside the choices"),
        ({"answer": True}, "the answer is true"),
        ({"answer": None}, "the answer is null"),
        ({"answer": 1.0}, "the answer is a number"),
        ({"choices": ["B", "A"], "answer": "A"}, "text of choice 1 and the letter of choice 0"),
        ({"choices": ["3", "1", "2"], "answer": 1, "id": "x"}, None),
        ({"choices": ["1", "2", "3"], "answer": 2}, "index of '3' and the text of another"),
        ({"choices": ["water"]}, "only one choice"),
        ({"choices": []}, "no choices"),
        ({"choices": ["water", "fire", "water"]}, "'water' is there twice"),
        ({"choices": ["water", "water "]}, "there twice"),
        ({"choices": ["caf\u00e9", "cafe\u0301", "water"]}, "the choice 'cafe\u0301' is there twice"),
        ({"choices": ["x\u00b2", "water", "x2"]}, None),
        ({"choices": ["water", " "]}, "choice 1 is blank"),
        ({"choices": ["water", 1]}, "choice 1 is a number"),
        ({"choices": "water"}, "not a list"),
        ({"choices": [f"c{i}" for i in range(27)], "answer": 0}, "at most 26"),
        ({"question": "  "}, '"question" is blank'),
        ({"question": 7}, '"question" is a number'),
        ({"question": "\ud800"}, "lone surrogate"),
        ({"anwser": "water", "answer": ...}, 'did you mean "answer"?'),
        ({"colour": "blue"}, "unknown key 'colour'"),
        ({"answer": ...}, 'no "answer"'),
        ({"choices": ...}, 'no "choices"'),
        ({"question": ...}, 'no "question" and no "text"'),
        ({"text": "both"}, '"text" and "question" in one row'),
        ({"id": 1.5}, '"id" is a number'),
    ],
)
def test_bad_question_rows_are_refused_with_file_and_line(tmp_path, change, said):
    bad = {key: value for key, value in {**QUESTION, **change}.items() if value is not ...}
    path = write(tmp_path / "own.jsonl", QUESTION, bad)
    if said is None:  # 1 is both index and text of '1': nothing to refuse
        assert load_rows(path)[1].answer == 1
        return
    with pytest.raises(UserError) as caught:
        load_rows(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert str(caught.value).endswith((".", "?")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"question": NaN}', "NaN is not JSON"),
        ('{"question": -Infinity}', "-Infinity is not JSON"),
        ('{"question": "a", "question": "b"}', "the key 'question' is there twice"),
        ("[" * 100_000, "not JSON"),
        ('{"answer": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_lines_that_are_not_json_objects_are_refused(tmp_path, line, said):
    path = write(tmp_path / "own.jsonl", QUESTION, "", line)
    with pytest.raises(UserError, match="own.jsonl:3: ") as caught:
        load_rows(path)
    assert said in str(caught.value)


def test_files_that_are_not_there_empty_or_not_utf8(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="is empty"):
        load_task(str(write(tmp_path / "blank.jsonl", "", "  ")))
    with pytest.raises(UserError, match="is a directory"):
        load_rows(tmp_path)
    with pytest.raises(UserError, match="holds none of train.jsonl"):
        load_task(str(tmp_path))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(QUESTION).encode() + b'\n{"question": "caf\xe9"}\n')
    with pytest.raises(UserError, match="latin.jsonl:2: not UTF-8"):
        load_rows(latin)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(QUESTION).encode() + b"\r\n\r\n")
    assert load_rows(path)[0].choices[1] == "water"


def test_ids_are_kept_and_must_differ(tmp_path):
    path = write(tmp_path / "own.jsonl", {**QUESTION, "id": "a"}, {**QUESTION, "id": 7}, QUESTION)
    assert [row.id for row in load_rows(path)] == ["a", "7", "own:3"]
    write(path, {**QUESTION, "id": "a"}, {**QUESTION, "id": "a"})
    with pytest.raises(UserError, match="own.jsonl:2: the id 'a' is also that of .*own.jsonl:1"):
        load_rows(path)


def test_text_rows_take_the_sorted_labels_of_the_train_split(tmp_path):
    write(tmp_path / "train.jsonl", {"text": "bad", "label": "no"}, {"text": "good", "label": "maybe"})
    write(tmp_path / "test.jsonl", {"text": "so so", "label": "no"})
    task = load_task(str(tmp_path))
    assert task.labels == ("maybe", "no") and set(task.splits) == {"train", "test"}
    assert task.split("train")[0] == Example("train:1", "bad", ("maybe", "no"), 1)
    assert task.split("test")[0].answer == 1
    with pytest.raises(UserError, match="no 'validation' split; it has 'train', 'test'"):
        task.split("validation")
    write(tmp_path / "test.jsonl", {"text": "so so", "label": "perhaps"})
    with pytest.raises(UserError, match="test.jsonl:1: the label 'perhaps' is none of 'maybe', 'no'"):
        load_task(str(tmp_path))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", "x"), ("b", "x")], "only one label, 'x'"),
        ([("a", "Yes"), ("b", "yes")], "in two spellings"),
        ([("a", 1), ("b", 0)], '"label" is a number'),
        ([("a", "x"), ("b", None)], "the label is null"),
        ([("a", "x"), ("b", " ")], '"label" is blank'),
    ],
)
def test_bad_labels_are_refused(tmp_path, rows, said):
    path = write(tmp_path / "own.jsonl", *({"text": text, "label": label} for text, label in rows))
    with pytest.raises(UserError, match=said):
        load_task(str(path))


def test_labels_may_be_many(tmp_path):
    names = [f"topic {i:03}" for i in range(150)]
    path = write(tmp_path / "own.jsonl", *({"text": f"about {name}", "label": name} for name in names))
    task = load_task(str(path))
    assert task.labels == tuple(names) and [row.answer for row in task.split("train")] == list(range(150))
    other = write(tmp_path / "other.jsonl", {"text": "about nothing", "label": "topic x"})
    with pytest.raises(UserError, match="other.jsonl:1: the label 'topic x' is none of 'topic 000', .* and 145 more; "):
        load_rows(other, labels=names)


def test_one_file_is_a_train_split_and_kinds_do_not_mix(tmp_path):
    path = write(tmp_path / "own.jsonl", QUESTION)
    task = load_task(str(path))
    assert (task.name, task.labels, task.source, set(task.splits)) == ("own", None, str(path), {"train"})
    write(path, QUESTION, {"text": "a", "label": "b"})
    with pytest.raises(UserError, match="own.jsonl:2: text rows and question rows"):
        load_task(str(path))
    write(tmp_path / "train.jsonl", QUESTION)
    write(tmp_path / "test.jsonl", {"text": "a", "label": "b"})
    with pytest.raises(UserError, match="mixes"):
        load_task(str(tmp_path))


def test_prediction_rows_need_no_answer(tmp_path):
    questions = write(tmp_path / "q.jsonl", {"question": "Wet?", "choices": ["no", "yes"]}, QUESTION)
    assert [row.answer for row in load_rows(questions, require_answer=False)] == [None, 1]
    with pytest.raises(UserError, match='no "answer"'):
        load_rows(questions)
    texts = write(tmp_path / "t.jsonl", {"text": "hm"}, {"text": "ha", "label": "b"})
    rows = load_rows(texts, labels=["b", "a"], require_answer=False)
    assert [(row.choices, row.answer) for row in rows] == [(("b", "a"), None), (("b", "a"), 0)]
    with pytest.raises(UserError, match="is there twice"):
        load_rows(texts, labels=["a", "a"], require_answer=False)
    two_forms = write(tmp_path / "f.jsonl", {"text": "a", "label": "caf\u00e9"}, {"text": "b", "label": "cafe\u0301"})
    with pytest.raises(UserError, match="is there twice .or in two spellings"):
        load_rows(two_forms)
    with pytest.raises(UserError, match="no labels given"):
        load_rows(write(tmp_path / "u.jsonl", {"text": "hm"}), require_answer=False)


def test_answers_that_are_not_needed_may_be_null_or_other_labels(tmp_path):
    texts = [{"text": "hm", "label": None}, {"text": "ha", "label": "new"}, {"text": "he", "label": "b"}]
    path = write(tmp_path / "t.jsonl", *texts)
    rows = load_rows(path, ["b", "a"], require_answer=False, foreign=True)
    assert [row.answer for row in rows] == [None, None, 0]
    assert [placed.example for placed in stream_rows(path, ["b", "a"])] == list(rows)
    several = {"text": "hm", "labels": ["b", "new"]}
    assert row_of(several, ["b", "a"], where="here", name="x") == Example("x", "hm", ("b", "a"), None)
    question = write(tmp_path / "q.jsonl", QUESTION | {"answer": None})
    assert [row.answer for row in load_rows(question, require_answer=False)] == [None]
    for labelled in (path, question):
        with pytest.raises(UserError, match="is null"):
            load_rows(labelled, ["b", "a"])


def test_pairs_of_texts_are_read_from_jsonl_and_parquet_and_kept(tmp_path):
    rows = [
        {"text": "a man sleeps", "text_pair": " he rests ", "label": "yes"},
        {"text": "a man runs", "text_pair": "he rests", "label": "no"},
    ]
    path = write(tmp_path / "own.jsonl", *rows)
    task = load_task(str(path))
    assert task.split("train")[0] == Example("own:1", "a man sleeps", ("no", "yes"), 1, pair="he rests")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    assert load_rows(tmp_path / "own.parquet") == task.split("train")
    write_task(task, tmp_path / "kept")
    assert read_task(tmp_path / "kept").splits == task.splits
    first, second = (Example("x", "a", ("no", "yes"), 0, pair=pair) for pair in ("b", "c"))
    assert first.content != second.content != Example("x", "a", ("no", "yes"), 0).content
    assert first.text == "a\nb"
    write_task(load_task(str(write(tmp_path / "s.jsonl", *TWO))), tmp_path / "single")
    assert "pair" not in (tmp_path / "single" / "train.jsonl").read_text("utf-8")


TWO = ({"text": "bad", "label": "no"}, {"text": "good", "label": "yes"})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "text_pair": " ", "label": "no"}, '"text_pair" is blank'),
        ({"text": "a", "text_pair": 7, "label": "no"}, '"text_pair" is a number'),
        ({"text": "a", "textpair": "b", "label": "no"}, 'did you mean "text_pair"?'),
        ({"text": "a", "text_pair": "b", "label": "no"}, 'rows with and without "text_pair" in one file'),
        ({**QUESTION, "text_pair": "b"}, "unknown key 'text_pair'"),
        ({"text": "a", "labels": ["no"], "label": "no"}, '"label" and "labels" in one row; write one of them.'),
        ({"text": "a", "labels": ["no"]}, 'rows with "label" and rows with "labels" in one file; keep to one of them.'),
        ({"text": "a", "labels": "no"}, '"labels" is text, not a list; write ["first", "second"], or [] for none.'),
        ({"text": "a", "labels": ["no", "no "]}, "the label 'no' is there twice; name each label of a row once."),
        ({"text": "a", "labels": ["no", 7]}, "label 1 is a number, not a text"),
    ],
)
def test_bad_text_rows_are_refused(tmp_path, row, said):
    path = write(tmp_path / "own.jsonl", *TWO, row)
    with pytest.raises(UserError, match="own.jsonl:3: ") as caught:
        load_rows(path)
    assert said in str(caught.value)


SEVERAL = (
    {"text": "late and broken", "labels": ["delivery", "damage"]},
    {"text": "thank you", "labels": []},
    {"text": "broken", "labels": ["damage"]},
)


def test_rows_of_several_labels_or_none(tmp_path):
    path = write(tmp_path / "own.jsonl", *SEVERAL)
    labels = ("damage", "delivery")
    rows = load_rows(path)
    assert [(row.choices, row.answer, row.answers) for row in rows] == [
        (labels, None, (0, 1)), (labels, None, ()), (labels, None, (0,)),
    ]  # fmt: skip
    assert [row.marks for row in rows] == [(1, 1), (0, 0), (1, 0)]
    assert [row.target for row in rows] == [(0, 1), (), (0,)]
    pq.write_table(pa.Table.from_pylist([dict(row) for row in SEVERAL]), tmp_path / "own.parquet")
    assert load_rows(tmp_path / "own.parquet") == rows
    # in a run's order of labels
    assert [row.answers for row in load_rows(path, labels=("other", "delivery", "damage"))] == [(1, 2), (), (2,)]
    assert [row.answers for row in rows_of(str(path), labels=("delivery", "damage", "x"))] == [(0, 1), (), (1,)]
    unlabelled = write(tmp_path / "new.jsonl", {"text": "a"}, SEVERAL[0])
    assert [row.answers for row in load_rows(unlabelled, labels, require_answer=False)] == [None, (0, 1)]
    assert label_counts(rows, labels) == {"damage": 2, "delivery": 1}
    foreign = write(tmp_path / "shifted.jsonl", {"text": "a", "labels": ["damage", "what"]}, SEVERAL[2])
    assert [row.answers for row in shifted_rows(str(foreign), labels=labels, several=True)] == [None, (0,)]
    assert [row.target for row in shifted_rows(str(foreign), labels=labels)] == [None, None]


@pytest.mark.parametrize(
    ("rows", "labels", "said"),
    [
        ([{"text": "a", "labels": []}] * 2, None, 'no row has a label, every "labels" is empty; give rows that have'),
        ([{"text": "a", "labels": ["damage"]}, *SEVERAL[1:]], None, "only one label, 'damage'"),
        (
            [{"text": "a", "labels": ["what"]}],
            ("damage", "delivery"),
            "label 'what' is none of 'damage', 'delivery'; mend",
        ),
    ],
)
def test_bad_files_of_several_labels_are_refused(tmp_path, rows, labels, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_rows(write(tmp_path / "own.jsonl", *rows), labels)


def test_splits_of_one_label_and_of_several_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", *SEVERAL)
    write(tmp_path / "test.jsonl", {"text": "a", "label": "damage"}, {"text": "b", "label": "delivery"})
    with pytest.raises(UserError, match='has splits with "label" and with "labels"; keep to one of them in all.'):
        load_task(str(tmp_path))


def test_splits_with_and_without_pairs_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", *TWO)
    write(tmp_path / "test.jsonl", *({**row, "text_pair": "b"} for row in TWO))
    with pytest.raises(UserError, match='splits with and without "text_pair"'):
        load_task(str(tmp_path))


def test_splits_may_be_parquet_and_validation_rows_of_another_name_are_refused(tmp_path):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(3) for word in ("wet", "dry")]
    write(tmp_path / "train.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "validation.parquet")
    write(tmp_path / "out_of_scope.jsonl", {"text": "who?"})  # what else lies there is nobody's split
    task = load_task(str(tmp_path))
    assert {split: len(part) for split, part in task.splits.items()} == {"train": 6, "validation": 2}
    write(tmp_path / "dev.jsonl", *rows)  # beside the real one it may be anything
    assert len(load_task(str(tmp_path)).splits["validation"]) == 2
    write(tmp_path / "validation.jsonl", *rows)
    with pytest.raises(UserError, match=r"holds validation\.jsonl and validation\.parquet; keep one of them"):
        load_task(str(tmp_path))
    for name in ("validation.jsonl", "validation.parquet"):
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"dev\.jsonl would not be read; call it validation\.jsonl"):
        load_task(str(tmp_path))


def test_a_home_of_nobody_is_a_missing_file(tmp_path):
    path = write(tmp_path / "own.jsonl", QUESTION | {"image": "~nosuch/x.png"})
    with pytest.raises(UserError, match=r"own.jsonl:1: .*~nosuch/x\.png"):
        load_rows(path)
    with pytest.raises(UserError, match="~nosuch/rows.jsonl"):
        rows_of("~nosuch/rows.jsonl")
