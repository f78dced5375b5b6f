"""Blocks of Python on a page, run as they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_blocks(page: str) -> list[str]:
    """The contents of its ```python blocks, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_blocks(page: str, names: dict[str, object], instead: Mapping[str, str]) -> dict[str, object]:
    """Run all blocks of a page with the names that it takes for granted, and give what they have made.

    Args:
        page: its path in the repository.
        names: what stands outside the blocks.
        instead: what the page says -> what is run in its place: sizes, words and addresses, each said at least once.
    """
    blocks = python_blocks(page)
    for said, run in instead.items():
        assert any(said in block for block in blocks), said
        blocks = [block.replace(said, run) for block in blocks]
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names
