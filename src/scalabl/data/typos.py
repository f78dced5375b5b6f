"""Text as people type it: rows with so many of their characters mistyped, the same ones on every machine."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace

from scalabl.data.example import Example

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_BESIDE = {
    key: [other for row in _KEYS[max(0, i - 1) : i + 2] for other in row[max(0, place - 1) : place + 2] if other != key]
    for i, keys in enumerate(_KEYS)
    for place, key in enumerate(keys)
}


def with_typos(rows: Sequence[Example], share: float, *, seed: int = 0) -> list[Example]:
    """The rows with each character of their texts mistyped with probability `share`, on its own: left out, typed twice,
    swapped with the next one, or, if it is a letter, a key beside it hit instead.

    Args:
        rows: n rows; their choices stay as they are.
        share: of the characters, between 0 and 1.
        seed: another seed makes other errors.
    """

    def mistyped(text: str) -> str:
        digest = hashlib.sha256(f"{seed}|{text}".encode()).digest()
        found = _mistyped(text, share, random.Random(int.from_bytes(digest[:8])))
        return found if found.strip() else text

    return [
        replace(row, question=mistyped(row.question), pair=None if row.pair is None else mistyped(row.pair))
        for row in rows
    ]


def _mistyped(text: str, share: float, drawn: random.Random) -> str:
    found: list[str] = []
    place = 0
    while place < len(text):
        here = text[place]
        place += 1
        if drawn.random() >= share:
            found.append(here)
            continue
        keys = _BESIDE.get(here.lower(), [])
        error = int(drawn.random() * (4 if keys else 3))
        if error == 1:
            found.append(here + here)
        elif error == 2 and place < len(text):
            found.append(text[place] + here)
            place += 1
        elif error == 3:
            key = keys[int(drawn.random() * len(keys))]
            found.append(key.upper() if here.isupper() else key)
    return "".join(found)
