"""Head: the logits of a classification head (Transformers' ...ForSequenceClassification) over fixed labels.

What most classifiers are: an encoder, or a decoder with a `score` layer, whose head is trained with the adapter. Rows
are padded on the right under Transformers' own two-dimensional mask, as these models are trained and served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.scoring.base import Batch, Encoded, Scoring


class Head(Scoring):
    """p(label | text) over C labels, one logit of the head each.

    Args:
        tokenizer: the base model's.
        labels: the C labels, in the order of the head's logits.
        max_length: longest row in tokens; longer texts lose their end.

    Raises:
        UserError: fewer than two labels.
    """

    name = "head"
    padding_side = "right"
    shares_prefix = False  # in an encoder a prefix sees what follows it

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, labels: Sequence[str], chat: bool = False, max_length: int = 512
    ) -> None:
        if chat:
            raise UserError("A classification head reads the text as it is; leave out --chat.")
        super().__init__(tokenizer, max_length=max_length)
        self.labels = tuple(labels)
        if len(self.labels) < 2:
            raise UserError(f"A classification head needs at least two labels, but there is {len(self.labels)}.")

    def settings(self) -> dict[str, Any]:
        return {"scoring": self.name, "labels": list(self.labels), "max_length": self.max_length}

    def encode(self, example: Example) -> Encoded:
        if tuple(example.choices) != self.labels:
            raise UserError(
                f"Row {example.id} has choices of its own, but the head has the {len(self.labels)} labels that it was "
                'trained on; give rows {"text", "label"}.'
            )
        if example.images:
            raise UserError(f"Row {example.id} has an image, which a classification head does not read; leave it out.")
        tokens = self.tokenizer(self.prefix + example.question, truncation=True, max_length=self.max_length)
        ids = list(tokens["input_ids"])
        if not ids:
            raise UserError(f"Row {example.id} has no token; give it a text.")
        return Encoded(ids, list(range(len(ids))), [0] * len(ids), len(self.labels), example.answer)

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(batch), device=batch.input_ids.device)
        return rows, torch.zeros_like(rows)

    def class_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits.float()
