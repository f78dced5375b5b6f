"""Letters: the next-token distribution over label words (" A", " B", ... or the labels themselves).

The paper's way to score, for models that know their letters. It reads the last position's logits at the label
tokens and leaves `lm_head` in place.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example, first_duplicate
from scalabl.data.template import LETTERED, TEXT
from scalabl.scoring.base import Batch, Encoded, require_single
from scalabl.scoring.prompted import Prompted


class Letters(Prompted):
    """p(label | prompt) over C label words, each one token.

    Args:
        labels: the label words; None for letters A, B, ... over the lettered choices of each question.
        num_letters: how many letters, when `labels` is None.
        template: how a row becomes a prompt; by default "{text}\\nLabel:", and the lettered choices behind a question.

    Raises:
        UserError: a label is not one token, or two labels are the same text or token; a template without the choices
            that the letters stand for.
    """

    name = "letters"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: tuple[str, ...] | list[str] | None = None,
        num_letters: int = 5,
        template: str | None = None,
        chat: bool = False,
        max_length: int = 512,
        turn: str = "template",
    ) -> None:
        shared = labels is not None
        if template is None:
            template = TEXT if shared else LETTERED
        super().__init__(tokenizer, template=template, shared=shared, chat=chat, max_length=max_length, turn=turn)
        if not shared and "choices" not in self.template.fields:
            raise UserError(
                f"template is {template!r}, without the {{choices}} that letters stand for; name them or take "
                "--scoring continuation."
            )
        self.labels = tuple(labels) if labels is not None else None
        self.num_letters = num_letters
        words = self.labels or tuple(string.ascii_uppercase[:num_letters])
        twice = first_duplicate(words)
        if twice is not None:
            raise UserError(f"The label {twice!r} is there twice; use labels that differ.")
        self.label_ids = torch.tensor([self._single_token(word) for word in words])
        if len(set(self.label_ids.tolist())) != len(words):
            raise UserError(f"Two of the labels {', '.join(words)} begin with the same token; use labels that differ.")

    def _single_token(self, word: str) -> int:
        ids = self.continuation_ids(word)
        if len(ids) != 1:
            pieces = ", ".join(repr(self.tokenizer.decode([i])) for i in ids)
            raise UserError(
                f"The label {word!r} is {len(ids)} tokens for this tokenizer ({pieces}), letters need one token a "
                "label; use a shorter word or --scoring continuation."
            )
        return ids[0]

    def settings(self) -> dict[str, Any]:
        return {
            "scoring": self.name,
            "labels": list(self.labels) if self.labels is not None else None,
            "num_letters": self.num_letters,
            **self.common_settings(),
        }

    def words(self, row: Example) -> Sequence[str]:
        return self.labels or string.ascii_uppercase

    def encode(self, example: Example) -> Encoded:
        require_single(example)
        if len(example.choices) > len(self.label_ids):
            raise UserError(
                f"Row {example.id} has {len(example.choices)} choices, but this scoring was made for "
                f"{len(self.label_ids)}; score rows with as many choices as in training."
            )
        images = self.images_of(example)
        whole = self.prompt_ids(self.prompt(example), images)
        ids = self.clip(whole, 0, images)
        positions, segments = list(range(len(ids))), [0] * len(ids)
        dropped = len(whole) - len(ids)
        return Encoded(ids, positions, segments, len(example.choices), example.answer, images=images, dropped=dropped)

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(batch), device=batch.input_ids.device)
        return rows, torch.full_like(rows, batch.input_ids.shape[1] - 1)

    def class_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        scores = logits[:, self.label_ids.to(logits.device)].float()
        absent = torch.arange(scores.shape[1], device=scores.device) >= batch.num_choices[:, None]
        return scores.masked_fill(absent, -torch.inf)
