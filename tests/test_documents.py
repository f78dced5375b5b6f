"""The documents name files that are there: every link, and every path in backticks that looks like one of ours."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "scalabl"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OURS = [ROOT / "docs" / name for name in ("architecture.md", "papers.md", "adding-a-method.md")] + [
    ROOT / "CONTRIBUTING.md"
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in OURS if page.exists()], ids=lambda page: page.name)
def test_every_file_that_the_house_s_pages_name_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+/)`", page.read_text(encoding="utf-8")))
    named = {name for name in named if name.endswith((".py", "/")) and "NAME" not in name}
    assert named, "a page of the house that names no file is not read right"
    missing = sorted(
        n for n in named - {"mean/"} if not any((place / n).exists() for place in (PACKAGE, ROOT, ROOT / "docs"))
    )
    assert not missing
