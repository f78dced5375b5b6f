"""A text in the terminal, each token on a ground as dark as its epistemic uncertainty is high.

Answers as one HTML file with figures for each token: no script, no network, nothing beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from scalabl.core.files import write_text
from scalabl.generation.answer import GeneratedAnswer

# a light to a dark orange that black and white text can be read on; the first is no ground at all
GROUNDS = (None, "#fff1dc", "#ffd9a8", "#fdb462", "#e6812f", "#b4480f")
INKS = (None, "#000000", "#000000", "#000000", "#000000", "#ffffff")
_SYMBOLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_SYMBOLS |= dict.fromkeys(range(127, 160), 0xFFFD)
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.4)  # nats of mutual information, the same in every text so that texts compare


def level(epistemic: float) -> int:
    """Which ground a token stands on: 0 (none) to 5."""
    return sum(epistemic >= limit for limit in LIMITS)


def shaded(answer: GeneratedAnswer) -> Text:
    """The answer's text with its grounds."""
    text = Text()
    for token in answer.tokens:
        ground, ink = GROUNDS[level(token.epistemic)], INKS[level(token.epistemic)]
        text.append(printable(token.text), style=f"{ink} on {ground}" if ground else "")
    return text


def printable(text: str) -> str:
    """A text that cannot steer the terminal: control characters but for tab and line's end as their symbols."""
    return text.translate(_SYMBOLS)


def legend() -> Text:
    """What the grounds mean."""
    text = Text("epistemic, nats: ", style="dim")
    for i, (ground, ink) in enumerate(zip(GROUNDS, INKS, strict=True)):
        words = f" <{LIMITS[0]} " if i == 0 else f" {LIMITS[i - 1]}+ "
        text.append(words, style=f"not dim {ink} on {ground}" if ground else "dim")
    return text


def in_terminal(answers: Sequence[GeneratedAnswer]) -> RenderableType:
    """Answers with their confidence, one below the other."""
    parts: list[RenderableType] = []
    for answer in answers:
        facts = Table.grid(padding=(0, 2))
        facts.add_row("confidence", f"{answer.confidence:.2f}" + ("" if answer.calibrated else "  (not calibrated)"))
        means = {name: _mean(answer, name) for name in ("total", "aleatoric", "epistemic")}
        facts.add_row("nats a token", ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
        if not answer.finished:
            facts.add_row("", "cut at the limit of tokens; raise --max-new-tokens")
        parts += [Text(printable(answer.prompt), style="dim"), shaded(answer), Text(""), facts, Text("")]
    return Group(*parts, legend())


def _mean(answer: GeneratedAnswer, name: str) -> float:
    return sum(getattr(token, name) for token in answer.tokens) / max(1, len(answer.tokens))


def write_page(answers: Sequence[GeneratedAnswer], path: Path, *, title: str, made: str) -> None:
    """Write the page, whole or not at all.

    Args:
        answers: what to show.
        path: the HTML file.
        title: its heading.
        made: a line on model, particles and settings.
    """
    write_text(path, render(answers, title=title, made=made))


def render(answers: Sequence[GeneratedAnswer], *, title: str, made: str) -> str:
    """The page's HTML."""
    source = files("scalabl.generation").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    key = [f"below {LIMITS[0]}", *(f"{limit} and more" for limit in LIMITS)]
    return template.render(answers=answers, level=level, key=key, title=title, made=made)
