"""Text of others reaches the terminal as text: no escape sequence, no markup, no forged line."""

import ast
import json
from pathlib import Path

import pytest
from program import Program
from rich.table import Table
from rich.text import Text

import scalabl
from scalabl.core.console import say, visible, words_console

# the terminal's title, its clipboard, a colour in 7 and in 8 bits, a line of its own, the other direction
HOSTILE = "\x1b]0;title\x07 \x1b]52;c;aGk=\x07 \x1b[31m \x9b31m a\rb \u202e x[/] [link=http://x]y[/link]"
SHOWN = r"\u001b]0;title\u0007 \u001b]52;c;aGk=\u0007 \u001b[31m \u009b31m a\u000db \u202e x[/] [link=http://x]y[/link]"


def test_what_steers_a_terminal_is_shown_as_json_writes_it() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("two\nlines\tand é ↑ 漢 \u200f") == "two\nlines\tand é ↑ 漢 \u200f"
    row = {"question": HOSTILE, "\x85": "\x7f"}
    assert json.loads(visible(json.dumps(row, ensure_ascii=False))) == row


def test_every_way_of_printing_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    say(HOSTILE, stderr=True)
    console = words_console()
    console.width = 300
    table = Table(HOSTILE, title=Text(HOSTILE))
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, "bold"))
    console.print(HOSTILE)
    console.print(table)
    shown = capsys.readouterr()
    assert shown.err == f"{SHOWN}\n" and shown.out.startswith(f"{SHOWN}\n")
    assert shown.out.count(r"\u001b]0;title") == 6
    assert not set("\x1b\x07\x9b\r\u202e") & set(shown.out)


@pytest.mark.parametrize("arguments", [("inspect", f"no{HOSTILE}"), ("plan", "--config", f"no{HOSTILE}")])
def test_a_sentence_quotes_it_so(arguments: tuple[str, ...], program: Program) -> None:
    said = program(*arguments)
    assert said.code == 2 and r"\u001b]0;title\u0007" in said.err
    assert not set("\x1b\x07\x9b\r\u202e") & set(said.err)


def test_nothing_else_prints() -> None:
    """`say` and `words_console` are the only doors to the terminal."""
    root, found = Path(scalabl.__file__).parent, []
    for path in root.rglob("*.py"):
        if path == root / "core" / "console.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "typer.echo", "typer.secho", "Console", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{path}: {ast.unparse(node)}")
    assert found == []
