"""A study of seconds, and what is asked of its cells."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scalabl.study.cells import finished
from scalabl.study.plan import StudyPlan
from scalabl.study.study import Study


@dataclass(frozen=True)
class Done:
    """A finished benchmark; not to be changed."""

    study: Study
    plan: StudyPlan
    output: Path
    rows: list[dict[str, Any]]
    task: str
    other: str


def content(base: Path, task: Path, **changes: Any) -> dict[str, Any]:
    """Plain LoRA, its ensemble and TFB, and ScalaBL with particles and without, with two seeds."""
    return {
        "model": str(base),
        "tasks": [str(task)],
        "methods": ["mle", "ensemble", "tfb", "scalabl", {"name": "scalabl mean", "method": "scalabl", "samples": 0}],
        "seeds": [0, 1],
        "samples": 3,
        "validation_rows": 9,
        "settings": {
            "steps": 8, "batch_size": 4, "save_steps": 4, "r": 4, "lora_alpha": 8, "learning_rate": 0.01,
            "layers": "last:2", "scoring": "continuation", "normalization": "token",
        },
    } | changes  # fmt: skip


def write(path: Path, study: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def finished_addresses(plan: StudyPlan, output: Path) -> set[str]:
    return {address for address in plan.cells if finished(output, address) is not None}


def snapshot(output: Path) -> dict[str, bytes]:
    """What every finished cell wrote at its end, with its times."""
    return {path.parent.name: path.read_bytes() for path in output.glob("cells/*/finished.json")}
