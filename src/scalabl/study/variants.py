"""The variants of a recipe's methods: a line of the table each. Imports no torch."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalabl.core.errors import UserError
from scalabl.runs.registry import BASELINE, METHODS, POST_HOC, SETTINGS
from scalabl.study.tasks import seeds_in, settings_in, texts_in, whole

TEMPERED = "+temperature"
_PREDICTIVES = ("mc", "linearized", "auto", "calibrated")


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own: one line of the table.

    Attributes:
        name: as in the table.
        method: one of `scalabl.runs.registry.METHODS`, without "temperature".
        settings: of its training run, over those that all share.
        samples: particles; 0 is the mean.
        family: its name without its point of a grid.
        point: setting -> its value in the grid; empty where there is no grid.
        without_grid: the settings that the family would have without one.
        predictive: of ScalaBL, "mc", "linearized", "auto", or "calibrated", as a run is predicted by default: auto at
            the posterior's scale that validation rows choose; "mc" is every other method's own.
        tried: settings of which one is chosen on each task; none where there is nothing to choose.
        of: the name of the variant whose runs and choice it has; its own name where they are its own.
        seeds, tasks: those that it is run with and on; None for all of the study.
        members: of an ensemble; None for a run of every seed.
        wave: cells of a higher one come later.
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    samples: int
    family: str
    point: Mapping[str, Any]
    without_grid: Mapping[str, Any]
    predictive: str = "mc"
    tried: tuple[Mapping[str, Any], ...] = ()
    of: str = ""
    seeds: tuple[int, ...] | None = None
    tasks: tuple[str, ...] | None = None
    members: int | None = None
    wave: int = 0

    @property
    def trained_method(self) -> str:
        """The method of its training run: a post-hoc method is fitted on an MLE run."""
        return BASELINE if self.method in POST_HOC else self.method

    @property
    def chooses(self) -> bool:
        """Whether settings are tried for it, and not for the variant that it is of."""
        return bool(self.tried) and self.of == self.name


def variants_in(
    entries: Any, settings: Mapping[str, Any], of_method: Mapping[str, Mapping[str, Any]], samples: int
) -> list[Variant]:
    """The variants of the entries of `methods`.

    Args:
        entries: names or mappings.
        settings: of every training run.
        of_method: those of one method's runs.
        samples: particles, where an entry does not say.

    Raises:
        UserError: a value that cannot work; the sentence names it.
    """
    found: list[Variant] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        own = dict(entry) if isinstance(entry, dict) else {"method": entry}
        parent = _parent(own.pop("of", None), own, found)
        method = _method(str(own.pop("method", parent.method if parent else own.get("name"))))
        if parent is None and method in POST_HOC:  # fitted on the chosen runs, where some are chosen
            parent = next((other for other in found if other.method == BASELINE and other.chooses), None)
        name, number = str(own.pop("name", method)), whole("samples", own.pop("samples", samples), 0)
        predictive = _predictive(name, method, number, own.pop("predictive", "mc"))
        more = _more(name, method, own)
        grid, tried = own.pop("grid", {}) or {}, _tried(name, own.pop("tried", None))
        if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
            raise UserError(f"grid of {name} must name settings with lists of values, for example r: [4, 8, 16].")
        if grid and tried:
            raise UserError(f"{name} has a grid and settings that are tried; leave out one of the two.")
        trained = BASELINE if method in POST_HOC else method
        shared = {**settings, **SETTINGS.get(trained, {}), **of_method.get(trained, {}), **of_method.get(method, {})}
        if parent is not None:
            if own or grid or tried:
                key = next(iter({**own, **({"grid": 0} if grid else {}), **({"tried": 0} if tried else {})}))
                raise UserError(f"{name} has the runs of {parent.name} and sets {key}; leave it out.")
            shared, tried = dict(parent.settings), parent.tried
        for point in itertools.product(*grid.values()):
            chosen = dict(zip(grid, point, strict=True))
            base = settings_in(name, {**shared, **own})
            full = settings_in(name, {**base, **chosen})
            called = f"{name} {in_words(chosen)}".strip()
            variant = Variant(
                called, method, full, number, name, chosen, base, predictive, tried, parent.name if parent else called,
                **more,
            )  # fmt: skip
            if variant not in found:
                found.append(variant)
    return found


def in_words(point: Mapping[str, Any]) -> str:
    """Settings as they stand in a name; nothing named is all: modules, rows."""
    return ", ".join(f"{name}={'all' if value is None else value}" for name, value in point.items())


def _method(named: str) -> str:
    if named not in METHODS:
        close = difflib.get_close_matches(named, METHODS, n=1)
        raise UserError(
            f"There is no method {named!r}{f'; did you mean {close[0]}?' if close else '.'} The methods are "
            f"{', '.join(METHODS)}."
        )
    # every method is reported with a temperature beside it: MLE's is the row that this name asks for
    return BASELINE if named == "temperature" else named


def _parent(named: Any, own: Mapping[str, Any], found: list[Variant]) -> Variant | None:
    if named is None:
        return None
    parent = next((other for other in found if other.name == named and other.of == named), None)
    if parent is None:
        raise UserError(f"{own.get('name')} is of {named!r}, which is no method above it; name one that has runs.")
    return parent


def _tried(name: str, given: Any) -> tuple[Mapping[str, Any], ...]:
    """A mapping of lists as all of their combinations, or a list of mappings as it is."""
    if given is None:
        return ()
    if isinstance(given, dict) and given and all(isinstance(values, list) and values for values in given.values()):
        points = [dict(zip(given, point, strict=True)) for point in itertools.product(*given.values())]
    elif isinstance(given, list) and given and all(isinstance(point, dict) for point in given):
        points = [dict(point) for point in given]
    else:
        raise UserError(
            f"tried of {name} must name settings with lists of values, for example learning_rate: [1e-3, 2e-3], or be "
            "a list of such settings."
        )
    for point in points:
        settings_in(f"tried of {name}", point)
    return tuple(points)


def _more(name: str, method: str, own: dict[str, Any]) -> dict[str, Any]:
    """What an entry has beside settings, taken out of it."""
    found: dict[str, Any] = {"wave": whole(f"wave of {name}", own.pop("wave", 0), 0)}
    if "seeds" in own:
        found["seeds"] = seeds_in(own.pop("seeds"))
    if "tasks" in own:
        found["tasks"] = texts_in(f"tasks of {name}", own.pop("tasks"))
    if "members" in own:
        found["members"] = whole(f"members of {name}", own.pop("members"), 2)
        if not METHODS[method].members:
            raise UserError(f"{name} names members, which are an ensemble's; leave them out.")
    return found


def _predictive(name: str, method: str, samples: int, given: Any) -> str:
    if given not in _PREDICTIVES:
        raise UserError(f"predictive of {name} is {given!r}; it must be one of {', '.join(_PREDICTIVES)}.")
    if given != "mc" and not METHODS[method].over_s:
        raise UserError(
            f"predictive of {name} is {given}, which is of scalabl alone; {method} has its own, leave it out."
        )
    if given != "mc" and samples == 0:
        raise UserError(f"{name} has samples 0, the mean, and predictive {given}; leave out one of the two.")
    return str(given)
