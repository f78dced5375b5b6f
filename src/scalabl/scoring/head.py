"""Head: the logits of a classification head (Transformers' ...ForSequenceClassification) over fixed labels.

What most classifiers are: an encoder, or a decoder with a `score` layer, whose head is trained with the adapter. Rows
are padded on the right under Transformers' own two-dimensional mask, as these models are trained and served. A row is a
text, or a pair of texts (a premise and its hypothesis), which the tokenizer puts together in its model's own way. It
has one of the labels, or any number of them (`scalabl.scoring.likelihood`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.likelihood import SeveralLabels


class Head(Scoring):
    """p(label | text) over C labels, one logit of the head each; of each label for itself where a row may have several.

    Args:
        tokenizer: the base model's.
        labels: the C labels, in the order of the head's logits.
        max_length: longest row in tokens; a longer text loses its end, of a pair the longer one first.
        pairs: whether rows are pairs of texts; None where that is not known, so that both are read.
        class_weights: w of each label, under which the head was trained (`scalabl.data.class_balance`): its logits are
            those of p_w, and the class logits here those of p(y | x), in proportion to p_w(y | x) / w_y.
        several: whether a row may have several of the labels, or none; then it has no class weights.

    Raises:
        UserError: fewer than two labels; class weights where rows have several labels.
    """

    name = "head"
    padding_side = "right"
    shares_prefix = False  # in an encoder a prefix sees what follows it

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        chat: bool = False,
        max_length: int = 512,
        pairs: bool | None = False,
        class_weights: Mapping[str, float] | None = None,
        several: bool = False,
    ) -> None:
        if chat:
            raise UserError("A classification head reads the text as it is; leave out --chat.")
        super().__init__(tokenizer, max_length=max_length)
        self.labels = tuple(labels)
        self.pairs = pairs
        self.class_weights = None if class_weights is None else {label: class_weights[label] for label in self.labels}
        self.several = several
        if several:
            if class_weights is not None:
                raise UserError(
                    "class_weights weigh rows by their one label, and here rows have several; leave them out."
                )
            self.likelihood = SeveralLabels()
        self.loses = "beginning" if tokenizer.truncation_side == "left" else "end"
        if len(self.labels) < 2:
            raise UserError(f"A classification head needs at least two labels, but there is {len(self.labels)}.")

    def settings(self) -> dict[str, Any]:
        pairs = {} if self.pairs is False else {"pairs": self.pairs}  # records of older runs do not name it
        weights = {} if self.class_weights is None else {"class_weights": self.class_weights}
        several = {"several": True} if self.several else {}
        common = {"scoring": self.name, "labels": list(self.labels), "max_length": self.max_length}
        return {**common, **pairs, **weights, **several}

    def encode(self, example: Example) -> Encoded:
        """Tokens of one row, as the tokenizer frames a text or a pair.

        Raises:
            UserError: choices other than the labels, an image, no text, a pair where the run has none or the other way
                round, likewise several labels, or no room beside the tokens that frame a text.
        """
        if tuple(example.choices) != self.labels:
            raise UserError(
                f"Row {example.id} has choices of its own, but the head has the {len(self.labels)} labels that it was "
                'trained on; give rows {"text", "label"}.'
            )
        if example.images:
            raise UserError(f"Row {example.id} has an image, which a classification head does not read; leave it out.")
        if self.pairs is not None and (example.pair is not None) != self.pairs:
            of_run, mend = ("pairs of texts", "give it one") if self.pairs else ("single texts", "leave it out")
            has = "no" if self.pairs else "a"
            raise UserError(f'Row {example.id} has {has} "text_pair", but the run was trained on {of_run}; {mend}.')
        if example.target is not None and (example.answers is not None) != self.several:
            has, of_run = (
                ('one "label"', 'several "labels" a row') if self.several else ('"labels"', 'one "label" a row')
            )
            raise UserError(f"Row {example.id} has {has}, but the run has {of_run}; write it so, or train another run.")
        texts = [self.prefix + example.question, *([] if example.pair is None else [example.pair])]
        tokens: BatchEncoding = self.tokenizer(*texts, return_special_tokens_mask=True, verbose=False)
        whole, frame = len(tokens["input_ids"]), sum(tokens["special_tokens_mask"])
        if whole == frame or not all(text.strip() for text in texts):
            raise UserError(f"Row {example.id} has an empty text, of which no token is left; give it a text.")
        if whole > self.max_length:
            if self.max_length - frame < len(texts):
                raise UserError(
                    f"max_length is {self.max_length}, of which {frame} tokens frame the text; raise --max-length to "
                    f"{frame + len(texts)} at least."
                )
            tokens = self.tokenizer(*texts, truncation="longest_first", max_length=self.max_length)
        ids = list(tokens["input_ids"])
        types = tokens.get("token_type_ids") if len(texts) > 1 else None
        return Encoded(
            ids,
            list(range(len(ids))),
            [0] * len(ids),
            len(self.labels),
            example.answer,
            dropped=whole - len(ids),
            token_types=None if types is None else list(types),
            marks=None if example.answers is None else example.marks,
        )

    @property
    def per_row(self) -> int:
        return len(self.labels) if self.several else 1

    def answers(self, rows: Sequence[Encoded]) -> Tensor:
        """(B,) the right labels; of several labels a row (B, C), 1 for those that it has; -100 where unknown."""
        if not self.several:
            return super().answers(rows)
        unknown = [-100] * len(self.labels)
        return torch.tensor([unknown if row.marks is None else list(row.marks) for row in rows])

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(batch), device=batch.input_ids.device)
        return rows, torch.zeros_like(rows)

    def class_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.class_weights is None:
            return logits.float()
        return logits.float() - self.weights(logits.device).log()

    def weights(self, device: torch.device) -> Tensor:
        """(C,) the labels' weights in the likelihood, 1 without class weights."""
        return torch.tensor(list((self.class_weights or dict.fromkeys(self.labels, 1.0)).values()), device=device)
