"""Text: the log-likelihood of what a row of text is trained on, a completion or the assistant's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data.text_rows import ASSISTANT, Message, TextRow, Words
from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.conversation import Opening, conversation_tokens, rendered, require_template, tokens_behind

IGNORED = -100  # the label of a token that is not trained on


@dataclass(frozen=True)
class EncodedText(Encoded):
    """One row of text as tokens. `labels` are the trained tokens, `IGNORED` elsewhere; the first token never is one."""

    labels: tuple[int, ...] = ()

    @property
    def cut(self) -> bool:
        """Whether the beginning was dropped."""
        return self.dropped > 0

    @property
    def trained(self) -> int:
        """How many tokens are trained on, at least 1."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class TextBatch(Batch):
    """Rows of text, padded on the left; labels (B, T), `IGNORED` where a token is not trained on."""

    labels: Tensor | None = None


class Text(Scoring):
    """log p(trained tokens | the tokens before them), summed: one number a row.

    A prompt and its completion are tokens of their own, as they are when a completion is generated behind a prompt; an
    end token follows the completion. With `chat`, both go through the chat template as a user's and an assistant's
    turn; messages always do.

    Args:
        tokenizer: the base model's.
        chat: put prompts and completions through the tokenizer's chat template.
        max_length: longest row in tokens; longer ones lose their beginning.
    """

    name = "text"

    def settings(self) -> dict[str, Any]:
        return {"scoring": self.name, "chat": self.chat, "max_length": self.max_length}

    def prompt_tokens(self, prompt: Words) -> list[int]:
        """The tokens that a completion is generated behind.

        Raises:
            UserError: messages, but the tokenizer has no chat template that writes them.
        """
        if isinstance(prompt, str):
            return self.prompt_ids(prompt)
        require_template(self.tokenizer, "the prompt")
        text = rendered(self.tokenizer, prompt, where="the prompt", generation=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, row: TextRow) -> EncodedText:  # type: ignore[override]
        """Tokens of one row.

        Raises:
            UserError: messages, but no template that writes them and tells the assistant's turns; what is trained on
                last leaves no room for a token before it.
        """
        ids, trained = self._tokens(row)
        labels = [token if mark else IGNORED for token, mark in zip(ids, trained, strict=True)]
        labels[0] = IGNORED  # nothing predicts it
        whole = len(ids)
        ids, labels = self._cut(row, ids, labels)
        positions, segments = list(range(len(ids))), [0] * len(ids)
        return EncodedText(ids, positions, segments, 1, None, dropped=whole - len(ids), labels=tuple(labels))

    @cached_property
    def _opening(self) -> Opening:
        return Opening()  # a completion is trained on and generated with all that the template opens it with

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows, columns = torch.nonzero(_labels(batch)[:, 1:] != IGNORED, as_tuple=True)
        return rows, columns

    def class_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits (M, V) at `positions` -> (B, 1) summed log-likelihood of each row's trained tokens, in nats."""
        rows, columns = self.positions(batch)
        log_likelihood = -F.cross_entropy(logits.float(), _labels(batch)[rows, columns + 1], reduction="none")
        sums = torch.zeros(len(batch), device=logits.device).index_add(0, rows, log_likelihood)
        return sums[:, None]

    def collate(self, rows: Sequence[Encoded]) -> TextBatch:
        batch = super().collate(rows)
        length = batch.input_ids.shape[1]
        labels = [_labels_of(row) for row in rows]
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        # the logits of the position before the first trained token are the first that are needed
        values["keep"] = max(len(own) - next(i for i, x in enumerate(own) if x != IGNORED) + 1 for own in labels)
        return TextBatch(**values, labels=torch.tensor([[IGNORED] * (length - len(own)) + list(own) for own in labels]))

    def _tokens(self, row: TextRow) -> tuple[list[int], list[bool]]:
        if isinstance(row.prompt, str) and isinstance(row.completion, str):
            if not self.chat:
                return self._pair(row.prompt, row.completion)
            messages = (Message("user", row.prompt), Message(ASSISTANT, row.completion.strip()))
            return conversation_tokens(self.tokenizer, messages, 1, f"Row {row.id}")
        assert not isinstance(row.prompt, str) and not isinstance(row.completion, str)
        require_template(self.tokenizer, f"Row {row.id}")
        return conversation_tokens(self.tokenizer, (*row.prompt, *row.completion), len(row.prompt), f"Row {row.id}")

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        given = self.prompt_ids(prompt)
        answer = tokens_behind(self.tokenizer, prompt[-1:], completion)
        end = self.tokenizer.eos_token_id
        if end is not None and answer[-1] != end:
            answer = [*answer, end]
        return given + answer, [False] * len(given) + [True] * len(answer)

    def _cut(self, row: TextRow, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """Drop the beginning of a row that is longer than `max_length`, but for a leading BOS."""
        over = len(ids) - self.max_length
        if over <= 0:
            return ids, labels
        last = _last_span(labels)
        if over >= last:
            raise UserError(
                f"Row {row.id} is trained on {len(ids) - last} tokens in its last turn, which leave no room for a "
                f"prompt within {self.max_length}; raise --max-length or shorten the row."
            )
        kept = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        labels = labels[:kept] + labels[over + kept :]
        labels[0] = IGNORED
        return ids[:kept] + ids[over + kept :], labels


def _last_span(labels: Sequence[int]) -> int:
    """Where the last run of trained tokens begins."""
    start = max(i for i, label in enumerate(labels) if label != IGNORED)
    while labels[start - 1] != IGNORED:
        start -= 1
    return start


def _labels_of(row: Encoded) -> tuple[int, ...]:
    assert isinstance(row, EncodedText)
    return row.labels


def _labels(batch: Batch) -> Tensor:
    assert isinstance(batch, TextBatch) and batch.labels is not None
    return batch.labels
