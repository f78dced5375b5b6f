"""An answer: a text, how likely it is to be right, the scores behind that, and figures for every token.

It is the answer's own part of a generated text, so that its scores are not those of what a model goes on to say. In the
terminal, and in one HTML file (no script, no network, nothing beside it), each token stands on a ground as dark as its
epistemic uncertainty is high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria

from scalabl.core.console import visible
from scalabl.core.files import write_text
from scalabl.core.pages import page_style
from scalabl.generation.correctness import answer_text
from scalabl.generation.decoding import Decoded


def answer_span(decoded: Decoded, stops: Sequence[str] = ("\n",)) -> Decoded:
    """The tokens up to the first stop string behind leading white space, that of the stop string included.

    The token that ends an answer counts, as an end token does: how sure the model was that the answer was complete is
    part of its probability. A text without a stop string stays as it is.

    Args:
        decoded: one generated text.
        stops: strings that end an answer, as in `answer_text`.

    Returns:
        the same, cut: `text` is then the answer, stripped, and it is finished.
    """
    end = _end("".join(decoded.tokens), stops)
    if end is None:
        return decoded
    length, taken = 0, 0
    while length < end:
        length += len(decoded.tokens[taken])
        taken += 1
    figures = {name: getattr(decoded, name)[:taken] for name in ("total", "aleatoric", "epistemic", "intersection")}
    return replace(
        decoded,
        text=answer_text(decoded.text, stops),
        token_ids=decoded.token_ids[:taken],
        tokens=decoded.tokens[:taken],
        log_probs=decoded.log_probs[:, :taken],
        finished=True,
        **figures,
    )


class AnswerEnd(StoppingCriteria):  # type: ignore[misc]
    """Ends a text where `answer_span` cuts it: white space in front of an answer, a line's end too, is no end of it.

    Args:
        tokenizer: the model's.
        stops: strings that end an answer.
        begin: the length of the padded prompts in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], begin: int) -> None:
        self.tokenizer, self.stops, self.begin = tokenizer, stops, begin

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.begin :])
        return torch.tensor([_end(text, self.stops) is not None for text in texts], device=input_ids.device)


def _end(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string behind leading white space ends, in letters; None where there is none."""
    begin = len(text) - len(text.lstrip())
    ends = [end + len(stop) for stop in stops if stop and (end := text.find(stop, begin)) >= 0]
    return min(ends, default=None)


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        text: what it adds to the text.
        probability: of the token under the average over particles.
        total, aleatoric, epistemic: nats, of the distribution that it was taken from.
    """

    text: str
    probability: float
    total: float
    aleatoric: float
    epistemic: float


@dataclass(frozen=True)
class GeneratedAnswer:
    """What `scalabl.generate` gives for a prompt.

    Attributes:
        prompt: what it answers.
        text: the answer.
        confidence: in [0, 1]; a probability of being right where `calibrated`, else the length-normalised
            probability of the text, exp(1/T sum_t log p(y_t)).
        calibrated: whether the confidence was fitted on validation rows.
        scores: name -> value; which direction means unsure is in `sequence_scores`.
        tokens: figures for every token.
        finished: whether the text ended by itself, rather than at the limit of tokens.
    """

    prompt: str
    text: str
    confidence: float
    calibrated: bool
    scores: dict[str, float]
    tokens: tuple[Token, ...]
    finished: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def tokens_of(decoded: Decoded) -> tuple[Token, ...]:
    """The tokens of a decoded text with their figures."""
    figures = (decoded.average_log_probs.exp(), decoded.total, decoded.aleatoric, decoded.epistemic)
    columns = [values.tolist() for values in figures]
    return tuple(Token(text, *row) for text, *row in zip(decoded.tokens, *columns, strict=True))


# a light to a dark orange that black and white text can be read on; the first is no ground at all
GROUNDS = (None, "#fff1dc", "#ffd9a8", "#fdb462", "#e6812f", "#b4480f")
INKS = (None, "#000000", "#000000", "#000000", "#000000", "#ffffff")
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.4)  # nats of mutual information, the same in every text so that texts compare


def level(epistemic: float) -> int:
    """Which ground a token stands on: 0 (none) to 5."""
    return sum(epistemic >= limit for limit in LIMITS)


def shaded(answer: GeneratedAnswer) -> Text:
    """The answer's text with its grounds."""
    text = Text()
    for token in answer.tokens:
        ground, ink = GROUNDS[level(token.epistemic)], INKS[level(token.epistemic)]
        text.append(visible(token.text), style=f"{ink} on {ground}" if ground else "")
    return text


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
        parts += [Text(visible(answer.prompt), style="dim"), shaded(answer), Text(""), facts, Text("")]
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
    style = Markup(page_style())
    return template.render(style=style, answers=answers, level=level, key=key, title=title, made=made)
