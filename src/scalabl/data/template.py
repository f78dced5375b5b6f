"""How a row becomes a prompt: a text with the row's fields in braces, as in "{text}\\nLabel:".

A brace of its own is written twice. A row {"prompt"} is a prompt already and goes through no template. A label follows
a prompt behind a space, and one that ends in a line's end directly.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from scalabl.core.errors import UserError
from scalabl.data.example import Example

TEXT = "{text}\nLabel:"  # of rows that share their labels
AS_IT_IS = "{text}"
QUESTION, LETTERED = "Question: {question}\nAnswer:", "Question: {question}\n{choices}\nAnswer:"
ASKED = "Question: {question}"  # in a chat, whose template opens the answer
_OF_TEXTS, _OF_QUESTIONS = ("text",), ("question", "choices")
_FIELDS = '{text} of rows {"text", "label"}, {question} and {choices} of rows with choices'


@dataclass(frozen=True)
class Template:
    """A prompt with gaps.

    Attributes:
        text: of it.

    Raises:
        UserError: braces that do not match, a field that no row has, or none that tells rows apart; a blank at its end.
    """

    text: str

    def __post_init__(self) -> None:
        given = f"template is {self.text!r}"
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(
                f"{given}, whose braces do not match ({error}); write a field as {{text}} and other braces twice."
            ) from error
        for _, name, form, conversion in parts:
            if name is not None and (name not in (*_OF_TEXTS, *_OF_QUESTIONS) or form or conversion):
                raise UserError(f"{given}, but {{{name}}} is no field of a row; there are {_FIELDS}.")
        if not {"text", "question"} & set(self.fields):
            raise UserError(f"{given}, which no row would change; name its fields in braces: {_FIELDS}.")
        if self.text != self.text.rstrip() and not self.ends_line:
            raise UserError(f"{given}, but a label brings the space in front of it; take the one at the end away.")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields that it names."""
        return tuple(name for _, name, _, _ in string.Formatter().parse(self.text) if name is not None)

    @property
    def ends_line(self) -> bool:
        """Whether a label begins a line of its own, with no space in front of it."""
        return ends_line(self.text)

    def require_kind(self, *, shared: bool) -> None:
        """Refuse fields that the rows do not have.

        Args:
            shared: whether they are texts that share their labels, and not questions with choices.

        Raises:
            UserError: the first such field.
        """
        known = _OF_TEXTS if shared else _OF_QUESTIONS
        for name in self.fields:
            if name not in known:
                kind = 'a text and its "label"' if shared else '"choices" of their own'
                raise UserError(
                    f"template is {self.text!r}, but the rows have {kind} and no {{{name}}}; use "
                    f"{' and '.join(f'{{{each}}}' for each in known)}."
                )

    def render(self, row: Example) -> str:
        """The prompt of a row; choices as lines "A. first"."""
        if row.rendered:
            return row.question
        values = {"text": row.question, "question": row.question}
        if "choices" in self.fields:
            lines = (f"{string.ascii_uppercase[i]}. {choice}" for i, choice in enumerate(row.choices))
            values["choices"] = "\n".join(lines)
        parts = string.Formatter().parse(self.text)
        return "".join(literal + ("" if name is None else values[name]) for literal, name, _, _ in parts)


def ends_line(prompt: str) -> bool:
    """Whether a prompt ends in a line's end and no other blank in front of it."""
    return prompt.endswith("\n") and prompt.rstrip("\n") == prompt.rstrip()


def template_of_prompts(rows: Sequence[Example]) -> str:
    """The template of rows that are prompts already: what a label follows is as at the end of the first."""
    return AS_IT_IS + ("\n" if ends_line(rows[0].question) else "")
