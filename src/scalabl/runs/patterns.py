"""Regular expressions of an adapter's configuration: those that could run for hours are refused before they are tried.

PEFT matches them against the name of every module, and Python's matching has no limit of time. A repeat inside a
repeat, and many repeats or alternatives in a row, are what makes it exponential; no adapter needs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from scalabl.core.errors import UserError

LONGEST = 4000  # characters: the alternatives of an image tower's names
_REPEATS, _BRANCHES = 4, 8
_STRINGS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_LISTS = ("layers_pattern",)
_KEYS = ("rank_pattern", "alpha_pattern")


def require_patterns(config: Mapping[str, Any], where: str) -> None:
    """Refuse patterns that could run for long.

    Args:
        config: an adapter's configuration as JSON.
        where: its file, for the message.

    Raises:
        UserError: one of them is too long or could take exponential time; it names its field.
    """
    for field, pattern in _patterns(config):
        why = f"longer than {LONGEST:,} characters" if len(pattern) > LONGEST else _slow(pattern)
        if why:
            raise UserError(
                f"{where}: {field} has a pattern that is {why} ({pattern[:60]!r}); name the modules themselves."
            )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in _STRINGS:
        if isinstance(value := config.get(field), str):
            yield field, value
    for field in _LISTS:
        value = config.get(field)
        yield from ((field, each) for each in value if isinstance(each, str)) if isinstance(value, list) else ()
    for field in _KEYS:
        value = config.get(field)
        yield from ((field, key) for key in value) if isinstance(value, dict) else ()


def _slow(pattern: str) -> str | None:
    """What makes a pattern slow; None for one that is fast, and for none (PEFT says so)."""
    try:
        parsed = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError):
        return None
    repeats = branches = 0
    waiting: list[tuple[Any, bool]] = [(parsed, False)]
    while waiting:
        items, repeated = waiting.pop()
        for name, value in items:
            inside = [(each, repeated) for each in _inside(value)]
            if str(name) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
                if repeated:
                    return "a repeat inside a repeat"
                several = value[1] > 1
                repeats += bool(several)
                branches += not several
                inside = [(each, several) for each in _inside(value)]
            elif str(name) == "BRANCH":
                if repeated:
                    return "a repeat of alternatives"
                branches += 1
            elif str(name).startswith("GROUPREF"):
                return "a reference to a group"
            waiting += inside
    if repeats > _REPEATS or branches > _BRANCHES:
        return f"of more than {_REPEATS} repeats or {_BRANCHES} choices in a row"
    return None


def _inside(value: Any) -> Iterator[Any]:
    """The sequences of items in an item's value, which may lie in tuples and lists."""
    if hasattr(value, "data") and hasattr(value, "state"):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _inside(each)
