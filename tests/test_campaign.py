"""What a part of the campaign takes for a fault."""

import os
import subprocess
import sys

import pytest
from campaign.parts import ROOT, Said
from campaign.readable import lines


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (Said(0, "a table\n", ""), None),
        (Said(2, "", "scalabl: There is no run; make one.\n"), None),
        (Said(2, "training: scalabl\nmemory: 3 MB\n", "scalabl: The rows cannot be scored; mend them.\n"), None),
        (Said(2, "a table\n", "scalabl: Too late; begin again.\n"), "a refusal behind results"),
        (Said(2, "", "scalabl: One.\nscalabl: Two.\n"), "exit code 2 with 2 lines"),
        (Said(2, "", "Error: not ours\n"), "exit code 2 with 1 lines"),
        (Said(1, "", "scalabl: One.\n"), "exit code 1"),
        (Said(None, "", "Traceback ...\nKeyError: 'x'\n"), "KeyError: 'x'"),
        (Said(None, "", "no end within 30 s"), "no end within 30 s"),
    ],
)
def test_a_call_ends_in_a_result_or_in_one_sentence(said: Said, fault: str | None) -> None:
    assert said.fault is None if fault is None else str(said.fault).startswith(fault)


@pytest.mark.parametrize("part", ["fuzz", "hostile", "soak", "threads", "versions"])
def test_a_part_says_what_it_does(part: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "campaign" / f"{part}.py"), "--help"]
    # a command that was run in this process before has left safe paths behind, and a part imports what lies beside it
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert said.returncode == 0 and "--results" in said.stdout, said.stderr


def test_the_table_of_threats_has_a_line_for_each_kind_of_file_and_no_other() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8").splitlines()
    first = [line.split("|")[1].strip() for line in page if line.startswith("| ")]
    assert first[0] == "what is read"
    found = [[name for name in lines() if row.startswith(name)] for row in first[1:]]
    assert [len(names) for names in found] == [1] * len(found), found
    assert sorted(name for names in found for name in names) == sorted(lines())
