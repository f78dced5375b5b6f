"""Hostile inputs, by Hypothesis: documents of our own formats with a few things wrong, and texts that are none.

A document is a good one with one to three mutations: a value of another kind in some place, a key that is gone, new or
there twice; its text is then perhaps cut, doubled, of another encoding or not text at all.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 10**9, 10**30, 0.5, -0.0, 1e308, 1e-320, -(2**63), 2**64, "", " ", "\n", "0", "nan",
    "inf", "true", "None", "1e5", "-", "..", "/", "~", "/dev/null", "/nowhere/at/all", "a/b", "\ud800", "\x00", "é",
    "e\u0301", "\u202e", "日本語", "[/b]", "[bold]x", ":smile:", "x" * 50_000, "a,b,,", "last:0", "last:999", "{",
    "{{ 1 / 0 }}", [], [[]], {}, [None], ["a", 1], {"a": None}, {"": ""}, [1] * 1000, "scalabl", "mle", "q_proj",
    ["q_proj"], "letters",
]  # fmt: skip
_KEYS = ("", "text", "question", "answers", "id", "r", "prompt", "x\x00")
values = st.one_of(
    st.sampled_from(_VALUES),
    st.text(max_size=12),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists, max_leaves=5),
)


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = document.items() if isinstance(document, dict) else enumerate(document)
    found = [path] if path else []
    for key, value in inner:
        found += _places(value, (*path, key)) if isinstance(value, dict | list) and value else [(*path, key)]
    return found


def _holder(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        document = document[key]
    return document


@st.composite
def mutated(draw: Draw, document: Any, most: int = 3) -> Any:
    """A document with up to `most` things wrong in it."""
    made = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = _places(made)
        if not places:
            break
        path = draw(st.sampled_from(places))
        holder, key = _holder(made, path), path[-1]
        kind = draw(st.sampled_from(("replace", "replace", "replace", "drop", "add", "swap")))
        if kind == "replace":
            holder[key] = draw(values)
        elif kind == "drop":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(_KEYS))] = draw(values)
        elif kind == "add":
            holder.append(draw(values))
        else:
            holder[key] = [holder[key]] if draw(st.booleans()) else {"value": holder[key]}
    return made


_BROKEN: list[Callable[[bytes], bytes]] = [
    lambda text: text[: len(text) // 2],
    lambda text: text + text,
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text.decode("utf-8", "replace").encode("utf-16"),
    lambda text: text.replace(b'"', b"'"),
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b":", b": :", 1),
    lambda text: b"",
    lambda text: b"\n\n \n",
    lambda text: b"null",
    lambda text: b"\x00" * 64,
    lambda text: b"\xff\xfe\xfa" + text,
    lambda text: b"[" * 20_000,
    lambda text: b'{"a":' * 20_000,
    lambda text: b"1" * 10_000,
    lambda text: text.replace(b"{", b'{"id": "x", "id": "y", ', 1),
    lambda text: text.replace(b"1", b"NaN").replace(b"2", b"-Infinity"),
    lambda text: b"&a [*a]",
    lambda text: b"a: &a [1]\nb: !!python/object:os.system x",
    lambda text: b"? [1, 2]\n: 3",
    lambda text: b"--- a\n--- b",
    lambda text: b"a: !!bool x\nb: !!timestamp y\nc: !!int ''\n",
]


@st.composite
def text_of(draw: Draw, document: str) -> bytes:
    """A document's text, two of three times as it is."""
    text = document.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 2)):
        return text
    return draw(st.sampled_from(_BROKEN))(text) if draw(st.integers(0, 4)) else draw(st.binary(max_size=200))


@st.composite
def json_file(draw: Draw, document: Any) -> bytes:
    """A mutated document as JSON."""
    return draw(text_of(json.dumps(draw(mutated(document)), ensure_ascii=draw(st.booleans()))))  # type: ignore[no-any-return]


@st.composite
def jsonl_file(draw: Draw, rows: list[dict[str, Any]]) -> bytes:
    """Good rows, of which one or two are mutated."""
    made = [copy.deepcopy(row) for row in rows]
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(made) - 1))
        made[at] = draw(mutated(made[at])) if made[at] else {}
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in made]
    return draw(text_of("".join(f"{line}\n" for line in lines)))  # type: ignore[no-any-return]


@st.composite
def yaml_file(draw: Draw, document: Any) -> bytes:
    """A mutated document as YAML."""
    import yaml

    made = draw(mutated(document))
    try:
        text = yaml.safe_dump(made, allow_unicode=draw(st.booleans()))
    except (UnicodeError, yaml.YAMLError):  # half a character
        text = json.dumps(made)
    return draw(text_of(text))  # type: ignore[no-any-return]


@st.composite
def safetensors_file(draw: Draw, whole: bytes) -> bytes:
    """A file of tensors with another header: lengths, names, shapes, offsets and types."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    kind = draw(st.sampled_from(("header", "header", "rename", "length", "cut", "noise")))
    if kind == "cut":
        return whole[: draw(st.integers(0, len(whole) - 1))]
    if kind == "noise":
        at = draw(st.integers(0, len(whole) - 1))
        return whole[:at] + draw(st.binary(min_size=1, max_size=40)) + whole[at + 1 :]
    if kind == "length":
        other = draw(st.sampled_from((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1)))
        return struct.pack("<Q", other) + whole[8:]
    if kind == "rename":
        name = draw(st.sampled_from(sorted(key for key in header if key != "__metadata__")))
        header[draw(st.sampled_from(("", name + ".x", name.replace("layers.", "layers.9"), "posterior", "\ud800")))] = (
            header.pop(name)
        )
    else:
        header = draw(mutated(header))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data
