"""Prompted: a scoring of labels or choices behind a prompt, which a template makes of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.data.template import Template, ends_line
from scalabl.scoring.base import Scoring
from scalabl.scoring.conversation import tokens_behind


class Prompted(Scoring):
    """What letters and continuations have in common.

    Args:
        template: how a row becomes a prompt (`scalabl.data.template`).
        shared: whether rows are texts that share their labels, and not questions with choices.

    The others are those of `Scoring`.

    Raises:
        UserError: a template that is none, or names fields which the rows do not have.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str,
        shared: bool,
        chat: bool,
        max_length: int,
        turn: str,
    ) -> None:
        super().__init__(tokenizer, chat=chat, max_length=max_length, turn=turn)
        self.shared = shared
        self.template = Template(template)
        self.template.require_kind(shared=shared)

    def common_settings(self) -> dict[str, Any]:
        """Those of every kind, and the template; records of older runs lack it and have the scoring's own."""
        return {"template": self.template.text, **super().common_settings()}

    def prompt(self, example: Example) -> str:
        """The text in front of the answer.

        Raises:
            UserError: it ends in a blank, in front of which no label was scored.
        """
        prompt = self.template.render(example)
        if not self.chat and prompt != prompt.rstrip() and not (self.template.ends_line and ends_line(prompt)):
            raise UserError(
                f"Prompt {example.id} ends in white space, but a label is scored with the space in front of it; "
                "take the white space off the prompt's end."
            )
        if not self.chat and self.template.ends_line and not ends_line(prompt):
            raise UserError(
                f"Prompt {example.id} does not end in a line's end, as those before it do; let all prompts end alike."
            )
        return prompt

    def in_words(self, row: Example) -> list[str]:
        """The template, and what the model reads of a row and is scored on behind it: a line each."""
        encoded = self.encode(row)
        read = self.tokenizer.decode([t for t, s in zip(encoded.input_ids, encoded.segments, strict=True) if s == 0])
        lines = ["the row's own prompt" if row.rendered else self.template.text, f'"{_short(str(read))}"']
        if row.answer is not None:
            word = self.words(row)[row.answer]
            lines[1] += f' answered by "{self.tokenizer.decode(self.continuation_ids(word))}"'
        return [
            f"{name}: {text}".replace("\n", "\\n") for name, text in zip(("template", "first row"), lines, strict=True)
        ]

    def words(self, row: Example) -> Sequence[str]:
        """What is scored for each choice of a row."""
        return row.choices

    def continuation_ids(self, text: str) -> list[int]:
        if not self.chat and self.template.ends_line:
            return tokens_behind(self.tokenizer, "\n", text.strip())
        return super().continuation_ids(text)


_SHOWN = 300  # characters of a prompt


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
