"""The tasks of a recipe, and the readers of plain values that it is made of. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scalabl.core.errors import UserError

# decided by the study, not by settings
_RESERVED = ("model", "data", "method", "seed", "validation_rows")


@dataclass(frozen=True)
class StudyTask:
    """What a study trains and tests on, under a name of its own.

    Attributes:
        name: in tables.
        data: a benchmark's name, or a path.
        model: where it is another one than the study's.
        settings: of its training runs, over those of methods.
        out_of_scope: data with rows of none of its labels.
        chosen_on: the task on which its settings are chosen, where some are tried; its own if None.
        wave: cells of a higher one come later.
        seeds: the only ones that it is run with, without ensembles that have others; None for all of a method's.
    """

    name: str
    data: str
    model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    out_of_scope: tuple[str, ...] = ()
    chosen_on: str | None = None
    wave: int = 0
    seeds: tuple[int, ...] | None = None


def tasks_in(listed: Any) -> dict[str, StudyTask]:
    """The tasks of a recipe by their names: each a name or path, or a mapping.

    Raises:
        UserError: a task without a name, or two of one name.
    """
    found: dict[str, StudyTask] = {}
    for entry in [listed] if isinstance(listed, str | dict) else listed if isinstance(listed, list | tuple) else [None]:
        if isinstance(entry, str):
            found.setdefault(entry, StudyTask(entry, entry))
            continue
        own = dict(entry) if isinstance(entry, dict) else {}
        name, data = own.pop("name", None), own.pop("data", None)
        if not isinstance(data, str) or not isinstance(name, str | None):
            raise UserError(
                "tasks must be a list of names, for example [arc-easy, openbookqa], or of {name, data, ...}."
            )
        name = name or data
        if name in found:
            raise UserError(f"Two tasks are called {name!r}; give one of them a name of its own.")
        others, wave = own.pop("out_of_scope", []), own.pop("wave", 0)
        model, chosen_on, seeds = own.pop("model", None), own.pop("chosen_on", None), own.pop("seeds", None)
        found[name] = StudyTask(
            name,
            data,
            None if model is None else str(model),
            settings_in(f"the task {name}", own),
            texts_in(f"out_of_scope of {name}", others) if others else (),
            None if chosen_on is None else str(chosen_on),
            whole(f"wave of {name}", wave, 0),
            None if seeds is None else seeds_in(seeds),
        )
    return found


def settings_in(where: str, values: Any) -> dict[str, Any]:
    """Settings of training runs.

    Raises:
        UserError: it is no mapping, or has what the study itself decides.
    """
    if not isinstance(values, dict | None):
        raise UserError(f"{where} must be a mapping of settings, name: value.")
    for name in values or {}:
        if name in _RESERVED:
            raise UserError(f"{where} sets {name}, which the study itself decides; give it at the study's top level.")
    return dict(values or {})


def mapping_in(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A mapping of the recipe, empty where it is left out.

    Raises:
        UserError: it is none.
    """
    value = content.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{key} must be a mapping, name: values.")
    return value


def texts_in(name: str, value: Any) -> tuple[str, ...]:
    """Names, each once.

    Raises:
        UserError: it is neither a name nor a list of them.
    """
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not listed or not all(isinstance(item, str) for item in listed):
        raise UserError(f"{name} must be a list of names, for example [arc-easy, openbookqa].")
    return tuple(dict.fromkeys(listed))


def seeds_in(value: Any) -> tuple[int, ...]:
    """Seeds, each once.

    Raises:
        UserError: there is none, or one that is no whole number.
    """
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise UserError("seeds is empty; give at least one.")
    return tuple(dict.fromkeys(whole("a seed", seed, 0) for seed in listed))


def rates_in(value: Any) -> tuple[float, ...]:
    """Shares of characters, each once.

    Raises:
        UserError: one that is not above 0 and at most 1.
    """
    listed = value if isinstance(value, list) else [value]
    for rate in listed:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise UserError(f"typos is {rate!r}; it must be a list of shares above 0, for example [0.05, 0.15].")
    return tuple(dict.fromkeys(map(float, listed)))


def whole(name: str, value: Any, least: int) -> int:
    """A whole number, at least so large.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
    return value
