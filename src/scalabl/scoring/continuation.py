"""Continuation: a softmax over the log-likelihoods of the choice texts, as sums or per token.

What small models are measured with. All choices of a question stand in one row behind their common prompt (the
mask keeps them apart), so that the prompt is encoded once and the choices share one draw of s.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.data.template import ASKED, QUESTION, TEXT
from scalabl.scoring.base import Batch, Encoded, require_single
from scalabl.scoring.prompted import Prompted


class Continuation(Prompted):
    """p(choice | question) = softmax over choices of log p(choice text | prompt).

    Args:
        normalization: "sum" of the tokens' log-likelihoods, or their mean per "token".
        task_labels: the choices are class words of a text rather than answers to a question.
        template: how a row becomes a prompt; by default "{text}\\nLabel:" or "Question: {question}\\nAnswer:", whose
            second line a chat leaves out.
    """

    name = "continuation"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        normalization: Literal["sum", "token"] = "token",
        task_labels: bool = False,
        template: str | None = None,
        chat: bool = False,
        max_length: int = 512,
        turn: str = "template",
    ) -> None:
        if template is None:
            template = TEXT if task_labels else ASKED if chat else QUESTION
        super().__init__(tokenizer, template=template, shared=task_labels, chat=chat, max_length=max_length, turn=turn)
        if normalization not in ("sum", "token"):
            raise UserError(f"normalization is {normalization!r}; it must be sum or token.")
        self.normalization = normalization
        self.task_labels = task_labels

    def settings(self) -> dict[str, Any]:
        return {
            "scoring": self.name,
            "normalization": self.normalization,
            "task_labels": self.task_labels,
            **self.common_settings(),
        }

    def encode(self, example: Example) -> Encoded:
        require_single(example)
        choices = [self.continuation_ids(choice) for choice in example.choices]
        if any(not ids for ids in choices):
            raise UserError(f"Row {example.id} has an empty choice; give every choice a text.")
        images = self.images_of(example)
        whole = self.prompt_ids(self.prompt(example), images)
        prompt = self.clip(whole, sum(len(ids) for ids in choices), images)
        start = len(prompt)
        input_ids, position_ids, segments = list(prompt), list(range(start)), [0] * start
        for number, ids in enumerate(choices, start=1):
            input_ids += ids
            position_ids += range(start, start + len(ids))
            segments += [number] * len(ids)
        dropped = len(whole) - len(prompt)
        return Encoded(input_ids, position_ids, segments, len(choices), example.answer, images=images, dropped=dropped)

    def positions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        segments = batch.segments
        # what predicts a choice's first token is the prompt's last position, otherwise the token before
        position = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        last_of_prompt = torch.where(segments == 0, position, -1).amax(dim=1, keepdim=True)
        previous = torch.cat([segments[:, :1], segments[:, :-1]], dim=1)
        source = torch.where(previous == segments, position - 1, last_of_prompt).clamp_min(0)
        rows, columns = torch.nonzero(segments > 0, as_tuple=True)
        return rows, source[rows, columns]

    def class_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        sums, counts = choice_log_likelihoods(logits, batch)
        scores = sums / counts.clamp_min(1) if self.normalization == "token" else sums
        return scores.masked_fill(counts == 0, -torch.inf)


def choice_log_likelihoods(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-likelihood and number of tokens of every choice.

    Args:
        logits: (M, V) at `Continuation.positions`, where the M choice tokens of the batch are predicted.
        batch: the rows.

    Returns:
        sums (B, C) in nats, 0 where a row has no such choice; counts (B, C).
    """
    rows, columns = torch.nonzero(batch.segments > 0, as_tuple=True)
    token = batch.input_ids[rows, columns]
    log_likelihood = -F.cross_entropy(logits.float(), token, reduction="none")
    num_classes = int(batch.num_choices.max())
    choice = batch.segments[rows, columns] - 1
    sums = torch.zeros(len(batch), num_classes, device=logits.device)
    sums = sums.index_put((rows, choice), log_likelihood, accumulate=True)
    counts = torch.zeros_like(sums).index_put((rows, choice), torch.ones_like(log_likelihood), accumulate=True)
    return sums, counts
