"""Short names for tables and pictures: of methods, settings and their values, tasks. CSV files keep the long ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from scalabl.runs.settings import typed_setting
from scalabl.study.study import Variant
from scalabl.study.summary import Table

# in a method's name; "" where the value speaks for itself
_IN_A_NAME = {
    "variational_learning_rate": "lr of s",
    "learning_rate": "lr",
    "init_sigma": "initial sigma",
    "prior_mean": "prior mean",
    "prior_std": "prior std",
    "stochastic_modules": "stochastic:",
    "stochastic_layers": "stochastic:",
    "target_modules": "adapted:",
    "unit_rows": "unit rows:",
    "draws": "one draw a",
    "kl": "KL",
    "covariance": "",
    "schedule": "",
}
_ALONE = {
    "variational_learning_rate": "learning rate of s",
    "learning_rate": "learning rate of A and B",
    "init_sigma": "initial sigma",
    "draws": "one draw of s a",
    "kl": "direction of the KL",
}


def setting(name: str) -> str:
    """A setting's name as an axis is called."""
    return _ALONE.get(name, name.replace("_", " "))


def value(given: Any) -> str:
    """A setting's value: 0.05, yes, all, q, v."""
    if given is None:
        return "all"
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, float):
        return f"{given:g}"
    return ", ".join(part.strip().removesuffix("_proj") for part in str(given).split(","))


def method(variant: Variant, *, tempered: bool = False) -> str:
    """ "scalabl (prior std 0.5) + T"."""
    parts = [
        f"{_IN_A_NAME.get(name, name.replace('_', ' '))} {value(typed_setting(name, given))}"
        for name, given in variant.point.items()
    ]
    point = f" ({', '.join(part.strip() for part in parts)})" if parts else ""
    return variant.family + point + (" + T" if tempered else "")


def of_tables(tables: Sequence[Table]) -> dict[str, str]:
    """Each task's name; a path's last part, unless two have the same."""
    last = {name: PurePath(name).name for table in tables for name in (table.trained_on, table.task)}
    return {name: short if list(last.values()).count(short) == 1 else name for name, short in last.items()}


def file_name(*parts: str) -> str:
    """A name for a file: letters, digits, dots and dashes."""
    return "-".join("".join(c if c.isalnum() or c in ".-" else "-" for c in part).strip("-") for part in parts)
