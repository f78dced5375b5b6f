"""Regular expressions of an adapter's configuration are fast, or refused before they are tried."""

import json
import time
from pathlib import Path

import pytest

from scalabl.core.errors import UserError
from scalabl.runs.directory import reading_config
from scalabl.runs.patterns import LONGEST, require_patterns

SLOW = {
    "repeats in a repeat": r"(a+)+$",
    "a choice in a repeat": r"(a?b?){30}c",
    "alternatives in a repeat": r"(a|aa)*$",
    "in a look ahead": r"(?=(.*)*x)y",
    "repeats in a row": r".*.*.*.*.*=x",
    "choices in a row": "a?" * 25 + "a" * 25,
    "alternatives in a row": "(a|aa)" * 25 + "b",
    "a group again": r"(.*)\1\1x",
    "long": "a" * (LONGEST + 1),
}
FAST = [
    "q_proj", r".*\.layers\.\d+\..*proj", r".*(q|k|v)_proj", r"(?!(?:model\.language_model|lm_head)(?:\.|$)).*",
    r"(?:.*\.)?layers\.(?:1|2)\.(?:self_attn\.)?(?:q_proj|v_proj)", "all-linear", "[", "(",
]  # fmt: skip
FIELDS = {
    "target_modules": lambda pattern: pattern,
    "exclude_modules": lambda pattern: pattern,
    "layers_pattern": lambda pattern: [pattern],
    "rank_pattern": lambda pattern: {pattern: 4},
    "alpha_pattern": lambda pattern: {"q_proj": 3, pattern: 4},
}


@pytest.mark.parametrize("kind", SLOW)
def test_what_could_run_for_hours_is_named(kind: str, tmp_path: Path) -> None:
    for field, made in FIELDS.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({field: made(SLOW[kind])}), encoding="utf-8")
        begin = time.monotonic()
        named = f"adapter_config.json: {field} has a pattern that is .*name the modules"
        with pytest.raises(UserError, match=named), reading_config(tmp_path):
            pytest.fail("read")
        assert time.monotonic() - begin < 5


def test_patterns_of_adapters_pass() -> None:
    for pattern in FAST:
        for field, made in FIELDS.items():
            require_patterns({field: made(pattern)}, "x")
    require_patterns({"target_modules": ["(a+)+"], "rank_pattern": None, "layers_pattern": 3}, "x")
