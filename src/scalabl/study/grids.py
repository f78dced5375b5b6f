"""The grids of a study: the settings that an entry of `methods` goes along, and their default. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scalabl.runs.settings import DEFAULTS, typed_setting
from scalabl.study.study import Study
from scalabl.study.variants import Variant


@dataclass(frozen=True)
class Axis:
    """One setting of a grid.

    Attributes:
        setting: its name in a recipe.
        values: in the recipe's order.
        default: the place of the value that the family would have without its grid; None where it is not among them.
    """

    setting: str
    values: tuple[Any, ...]
    default: int | None


@dataclass(frozen=True)
class Grid:
    """The variants of one entry of `methods` with a grid.

    Attributes:
        family: the entry's name.
        axes: its settings.
        variants: place on each axis -> variant.
    """

    family: str
    axes: tuple[Axis, ...]
    variants: Mapping[tuple[int, ...], Variant]

    @property
    def default(self) -> Variant | None:
        """The variant with every setting at its default, if there is one."""
        place = [axis.default for axis in self.axes]
        return self.variants.get(tuple(p for p in place if p is not None)) if None not in place else None


def grids(study: Study) -> list[Grid]:
    """The grids of a study, in its order."""
    families: dict[str, list[Variant]] = {}
    for variant in study.variants:
        if variant.point:
            families.setdefault(variant.family, []).append(variant)
    return [_grid(family, variants) for family, variants in families.items()]


def _grid(family: str, variants: list[Variant]) -> Grid:
    without = variants[0].without_grid
    axes = []
    for name in variants[0].point:
        values = tuple(dict.fromkeys(typed_setting(name, variant.point[name]) for variant in variants))
        default = typed_setting(name, without[name]) if name in without else DEFAULTS[name]
        axes.append(Axis(name, values, values.index(default) if default in values else None))
    places = {
        tuple(axis.values.index(typed_setting(axis.setting, variant.point[axis.setting])) for axis in axes): variant
        for variant in variants
    }
    return Grid(family, tuple(axes), places)
