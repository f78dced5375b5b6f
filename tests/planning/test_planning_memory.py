"""What there is, and the largest batch that fits it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scalabl.core.errors import UserError
from scalabl.planning import memory
from scalabl.planning.memory import in_words, machine_memory, parse_bytes
from scalabl.planning.plan import LARGEST, largest_batch


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 1_500_000_000), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "big", "24XB", "-3GB", "0GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="for example 24GB"):
        parse_bytes(text)


def test_sizes_in_words() -> None:
    assert [in_words(n) for n in (12, 3456, 7_890_000, 24 * 10**9)] == ["12 B", "3.5 kB", "7.9 MB", "24.0 GB"]


@pytest.mark.parametrize("files", [("memory.max", "memory.current", "inactive_file", ""), (
    "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory")])  # fmt: skip
def test_a_containers_limit_counts(
    files: tuple[str, str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = machine_memory("cpu")
    limit, used, name, place = files
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / limit).write_text("1000000\n")
    (tmp_path / place / used).write_text("300000\n")
    (tmp_path / place / "memory.stat").write_text(f"other 5\n{name} 100000\n")
    assert machine_memory("cpu") == 800_000 < whole
    (tmp_path / place / limit).write_text("max\n")
    assert machine_memory("cpu") > 10**7


def peaks(kind: str) -> Callable[[int], int]:
    return {
        "linear": lambda batch: 1000 + 37 * batch,
        "bent": lambda batch: 1000 + max(37 * batch, 60 * batch - 400),
        "flat": lambda batch: 1000,
        "stairs": lambda batch: 1000 + 100 * (batch // 3),
    }[kind]


@pytest.mark.parametrize("kind", ["linear", "bent", "flat", "stairs"])
@pytest.mark.parametrize("card", [999, 1000, 1037, 1300, 1400, 5000, 10**5, 10**6])
def test_the_largest_batch_is_the_largest(kind: str, card: int) -> None:
    peak = peaks(kind)
    expected = max((batch for batch in range(1, LARGEST + 1) if peak(batch) <= card), default=0)
    asked: list[int] = []

    def counted(batch: int) -> int:
        asked.append(batch)
        return peak(batch)

    assert largest_batch(card, counted) == expected
    assert len(asked) <= (21 if kind == "stairs" else 8)
