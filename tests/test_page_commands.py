"""Every command that a page shows is one: it is read by the real command line, or the file that it names is there.

A block of ```python or ```console is run (`test_tutorials.py`, `test_page_blocks.py`). One of ```bash needs several
cards or machines: it is not run, and is counted here. An indented line is a form: [..] may be left out, a|b is one of
the two, ... is what stands there in your case.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from scalabl.cli.main import app
from scalabl.runs.settings import make_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs" / "tutorials").glob("*.md"))
NOT_RUN = {"scaling.md": 2}  # blocks of ```bash
ELSEWHERE = ("pip", "git", "curl", "vllm", "accelerate")  # programs of others
OTHERS = ("--wheel", "--lora-target-modules", "--max-loras", "--num_processes", "--nproc_per_node")  # and their options
PROGRAM = typer.main.get_command(app)


def commands_on(page: Path) -> list[str]:
    """The lines of its blocks that begin with a program, continued lines joined, comments left out."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"^```(?:console|bash)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shown += re.findall(r"^    (\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in "\n".join(shown).splitlines()]
    programs = ("scalabl", "python", "make", *ELSEWHERE)
    return [line for line in lines if line.split(" ")[0] in programs]


def forms_of(line: str) -> list[list[str]]:
    """The command lines that a form stands for, each with all that may be left out, and one without.

    Where ... stands for options, those that are required are there; behind an option it is a value.
    """
    shortest = line
    while shortest != (shortest := re.sub(r"\[[^][]*\]", "", shortest)):
        pass
    found = []
    for each in (re.sub(r"[][]", "", line), shortest):
        words = [word for word in shlex.split(each) if word != "|"]
        words = [word for before, word in zip(["", *words], words, strict=False) if word != "..." or before[:2] == "--"]
        choices = [word.split("|") for word in words]
        found += [[c[min(i, len(c) - 1)] for c in choices] for i in range(max(map(len, choices)))]
    return found


def read(words: list[str], *, whole: bool) -> None:
    """Read a command line as the program does, but for what it would do; the settings of a training are checked too.

    Raises:
        Exception: what the program would have refused it with.
    """
    command: Any = PROGRAM
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    if not whole:
        required = [
            parameter.opts[0] for parameter in command.params if parameter.required and parameter.opts[0][0] == "-"
        ]
        words += [word for option in required if option not in words for word in (option, "x")]
    given = dict(command.make_context(command.name, words).params)
    if command.name == "train" and given.pop("config") is None:
        own = ("output", "json", "ignore_memory")
        make_settings({name: value for name, value in given.items() if name not in own}, None)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_on(page)], ids=lambda page: page.stem)
def test_every_command_of_a_page_is_one(page: Path) -> None:
    for line in commands_on(page):
        program, _, rest = line.partition(" ")
        inside = re.search(r"-m scalabl (?!serving)(.*)", line)
        if program == "scalabl" or inside:
            for words in forms_of(inside[1] if inside else rest):
                try:
                    read(words, whole=" ..." not in line)
                except Exception as error:
                    pytest.fail(f"{page.name}: {line}: {error}")
        elif program == "make":
            assert re.search(rf"^{rest.split()[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), (
                line
            )
        elif program == "python":
            script(line)
        elif program == "pip" and (extra := re.search(r"scalabl\[(\w+)\]", line)):
            assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), line


def script(line: str) -> None:
    """A line of `python` names a file of ours, and options that the file has."""
    words = line.split()
    named = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
    [file] = [place / named for place in (ROOT, ROOT / "src") if (place / named).is_file()]
    if words[1] == "-m":
        return  # the options are those of the program that it becomes
    text = file.read_text(encoding="utf-8")
    for option in re.findall(r"\s--([a-z][a-z-]*)", line):
        assert f'"--{option}"' in text or re.search(rf"\b{option.replace('-', '_')}=\(", text), (line, option)


def options_of(command: Any) -> set[str]:
    """The options of a command and of all below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


def test_every_option_that_a_sentence_names_is_one() -> None:
    """In backticks: of a command, of a script in the repository, or of a program that the page names."""
    ours = options_of(PROGRAM) | {"--help", "--version"}
    files = [path for name in ("benchmarks", "scripts", "examples") for path in (ROOT / name).rglob("*.*")]
    scripts = "".join(path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".sh"))
    missing = []
    for page in PAGES:
        spans = re.findall(r"`([^`\n]*--[a-z][^`\n]*)`", page.read_text(encoding="utf-8"))
        for span in spans:
            for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]*", span):
                field = option[2:].replace("-", "_")
                known = option in ours | set(OTHERS) or f'"{option}"' in scripts or f" {option})" in scripts
                if not known and not re.search(rf"\b{field}=\(", scripts):
                    missing.append((page.name, span))
    assert not missing


def test_blocks_that_are_not_run_are_counted() -> None:
    """A block is of a kind that is run, or of one that is stated; nothing is overlooked."""
    counted = {}
    for page in PAGES:
        kinds = re.findall(r"^```(\w*)\n.*?^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert set(kinds) <= {"console", "python", "json", "bash"}, page
        if "bash" in kinds:
            counted[page.name] = kinds.count("bash")
    assert counted == NOT_RUN
