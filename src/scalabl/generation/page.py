"""Answers as one HTML file with figures for each token: no script, no network, nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from scalabl.generation.answer import Answer
from scalabl.generation.shading import LIMITS, level
from scalabl.run_directory import write_text


def write_page(answers: Sequence[Answer], path: Path, *, title: str, made: str) -> None:
    """Write the page, whole or not at all.

    Args:
        answers: what to show.
        path: the HTML file.
        title: its heading.
        made: a line on model, particles and settings.
    """
    write_text(path, render(answers, title=title, made=made))


def render(answers: Sequence[Answer], *, title: str, made: str) -> str:
    """The page's HTML."""
    source = files("scalabl.generation").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    key = [f"below {LIMITS[0]}", *(f"{limit} and more" for limit in LIMITS)]
    return template.render(answers=answers, level=level, key=key, title=title, made=made)
