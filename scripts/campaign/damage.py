"""Cases of the fuzz: arguments from the command line's own grammar, and files whose bytes are changed.

A case is decided by its seed and its number alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from readable import READ, Readable, forged

ARGUMENTS = "arguments"
OUTPUT_OPTIONS = ("--output", "--json", "--html", "--report", "--results")
_WORDS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"Infinity", b"9" * 25, b"1e-300", b'""', b'"x"', b"[]",
    b"{}", b"[[]]", b'"~nosuch/x"', b'"/dev/null"', b'"\\u001b]0;x\\u0007"', b'"[/b]"', b'"\\ud800"', b"{", b'"',
    b"2.5", b"!!bool x", b"&a [*a]", b".inf", "last:²".encode(), b'"(a+)+$"', b"\x00", b'"../../../x"', b"- - - -",
    b"1" * 5000, b"[" * 3000, b'"last:0"', b'"1"',
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')
_VALUES = (
    "", " ", "-1", "0", "1", "2", "3", "0.5", "1e999", "nan", "-inf", "1e-320", "9" * 25, "x", "last:1", "last:0",
    "last:²", "all", "auto", "none", "[/b]", "[link=http://x]a", "\x1b]0;x\x07", "é", "日本", "a,b,,", "--", "-x",
    "~nosuch/x", "/dev/null", "/proc/self/mem", "nosuch/x", ".", "..", "/", "run", "mle", "head", "base", "encoder",
    "rows", "texts", "open", "rows.parquet", "rows/test.jsonl", "recipe.yaml", "study.yaml", "priors.json", "link",
    "run/scalabl.json", "out/new", "out/[bold]x", "arc-easy", "sciq", "s3://nosuch/x", "file:///nosuch", "letters",
    "http://127.0.0.1:9", "mc", "mean", "linearized", "24GB", "1TB", "q_proj", "all-linear", "(a+)+$", "x" * 5000,
    "scalabl", "local", "float16",
)  # fmt: skip
_COMMANDS = (
    "train", "evaluate", "predict", "generate", "acquire", "bayesianize", "calibrate", "export", "inspect", "plan",
    "benchmark", "data",
)  # fmt: skip
_OUTPUTS = (
    "out/a.json", "out/b.jsonl", "out/c.html", "out/new", "run/scalabl.json", "run", "rows/test.jsonl", "link", "out",
)  # fmt: skip
_FIRST = ("run", "head", "mle", "language", "rows/test.jsonl", "study.yaml", *_VALUES[:5])


@dataclass(frozen=True)
class Case:
    """What is tried: the arguments (or a function that reads), and how a file was damaged."""

    kind: str
    arguments: tuple[str, ...]
    call: Callable[[], object] | None
    damage: str

    @property
    def words(self) -> str:
        """For people: what is called, and on what."""
        name = self.call.__name__ if self.call else f"scalabl {' '.join(self.arguments)}"
        return f"{ascii(name)[1:-1]}; {self.damage}" if self.damage else ascii(name)[1:-1]


def damaged(rng: random.Random, content: bytes, others: Sequence[Path]) -> tuple[bytes, str]:
    """Other bytes in the place of a file's, and what was done to them."""
    kind = rng.choice(
        ("bits", "bytes", "cut", "word", "word", "word", "word", "drop", "double", "empty", "other", "noise")
    )
    size = len(content)
    at = rng.randrange(size) if size else 0
    if kind == "bits" and size:
        made = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            made[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(made), kind
    if kind == "bytes":
        new = rng.choice((rng.randbytes(rng.randint(1, 40)), b"\xff" * 8, b"\x00" * 16))
        return content[:at] + new + content[at + len(new) * rng.randint(0, 1) :], kind
    if kind == "word" and (found := list(_TOKEN.finditer(content[:20_000]))):
        token, word = rng.choice(found), rng.choice(_WORDS)
        return content[: token.start()] + word + content[token.end() :], f"{kind} {token[0][:20]!r} -> {word[:20]!r}"
    if kind == "drop":
        return content[:at] + content[at + rng.randint(1, 200) :], kind
    if kind == "double":
        end = min(size, at + rng.randint(1, 300))
        return content[:end] + content[at:end] + content[end:], kind
    if kind == "empty":
        return b"", kind
    if kind == "other":
        other = rng.choice(others)
        return other.read_bytes(), f"{kind}, {other.name}"
    if kind == "noise":
        return rng.randbytes(rng.randint(1, 300)), kind
    return content[:at], "cut"


def of_file(rng: random.Random, read: Readable, place: Path) -> Case:
    """Damage a file, and name what reads it."""
    files = sorted(path for pattern in read.files for path in place.glob(pattern) if path.is_file())
    path = rng.choice(files)
    shown, fate = str(path.relative_to(place)), rng.random()
    if fate < 0.04:
        path.unlink()
        damage = f"no {shown}"
    elif fate < 0.08:
        path.unlink()
        rng.choice((path.mkdir, lambda: path.symlink_to("nowhere"), lambda: path.symlink_to(path)))()
        damage = f"{shown} is a directory or a link to nowhere"
    else:
        everything = sorted(p for p in place.rglob("*") if p.is_file())
        content, how = damaged(rng, path.read_bytes(), everything)
        path.write_bytes(content)
        if rng.random() < 0.7:
            forged(place, path)
        damage = f"{shown}: {how}"
    owner = shown.partition("/")[0]
    fitting = [each for each in read.commands if not isinstance(each, str) or owner in each] or list(read.commands)
    command = rng.choice(fitting)
    if isinstance(command, str):
        return Case(read.line, tuple(command.split()), None, damage)
    return Case(read.line, (), command, damage)


def of_arguments(rng: random.Random) -> Case:
    """A command with options that it has, and values good and bad; now and then with words that belong nowhere."""
    if rng.random() < 0.5:  # a command that works, with one option more or another value
        words = [each for read in READ for each in read.commands if isinstance(each, str)]
        given = rng.choice(words).split()
        command = _command(given[0]) if given[0] != "data" else None
        for _ in range(rng.randint(1, 2)):
            if command is not None and rng.random() < 0.7:
                given += _option(rng, rng.choice([p for p in command.params if p.opts[0].startswith("-")]))
            else:
                given[rng.randrange(1, len(given))] = rng.choice(_VALUES)
        return Case(ARGUMENTS, tuple(given), None, "")
    name = rng.choice(_COMMANDS)
    given = [name]
    if name == "data":
        words = rng.choices(("list", "get", "sciq", "arc-easy", "x", "--help", "-x", ""), k=2)
        return Case(ARGUMENTS, (name, *words), None, "")
    for parameter in _command(name).params:
        if not parameter.opts[0].startswith("-"):
            given += [
                rng.choice(("run", "head", "mle", "language", "rows/test.jsonl", "study.yaml", rng.choice(_VALUES)))
            ]
        elif rng.random() < (0.95 if parameter.required else 0.12):
            given += _option(rng, parameter)
    if rng.random() < 0.1:
        given.insert(rng.randint(0, len(given)), rng.choice((*_VALUES, "--nosuch", "--help", "--version")))
    return Case(ARGUMENTS, tuple(given), None, "")


def _command(name: str) -> Any:
    import typer

    from scalabl.cli.main import app

    group: Any = typer.main.get_command(app)
    return group.commands[name]


def _option(rng: random.Random, parameter: Any) -> list[str]:
    option = rng.choice((*parameter.opts, *parameter.secondary_opts))
    if getattr(parameter, "is_flag", False):
        return [option]
    return [option, rng.choice(_OUTPUTS if option in OUTPUT_OPTIONS and rng.random() < 0.8 else _VALUES)]


def case_of(seed: int, number: int, place: Path) -> Case:
    """The case of a number: a third are arguments, the others damaged files."""
    rng = random.Random(f"{seed}-{number}")
    if number % 3 == 0:
        return of_arguments(rng)
    return of_file(rng, rng.choices(READ, [each.share for each in READ])[0], place)
