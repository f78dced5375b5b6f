"""A model, a scoring and, where the lower layers are frozen, the trunk that is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.template import AS_IT_IS
from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.continuation import Continuation, choice_log_likelihoods
from scalabl.scoring.head import Head
from scalabl.scoring.letters import Letters
from scalabl.scoring.read_token import reads_first_token
from scalabl.scoring.reading import reads_packed, require_unread_padding
from scalabl.scoring.text import Text
from scalabl.scoring.trunk import Trunk, head_inputs, token_logits
from scalabl.tuner.layers import learnt_positions, reads_images, sequence_classifier
from scalabl.tuner.threads import base_model

TOLERANCE = 5e-2  # relative, for rounding between a row of its own and a packed one


class Scorer:
    """Class logits of rows under the model's present state (mean, draws or particles).

    Args:
        model: a causal language model, with an adapter or without.
        scoring: how rows become class logits.
        trunk: the lower layers, or None to run every layer every time, as image-text models always do (what their
            image side saw may enter between the layers).

    Attributes:
        shares_prefix: whether the model gives the same answers behind a shared prefix; None before it was tried.

    Raises:
        UserError: the scoring is of a classification head and the model has none, or the other way round.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, scoring: Scoring, trunk: Trunk | None = None) -> None:
        self.model: Any = model
        self.scoring = scoring
        if isinstance(scoring, Head) != (sequence_classifier(model) is not None):
            kind = type(base_model(model)).__name__
            raise UserError(
                f"The model is a {kind}, which {scoring.name} does not score; give a causal language model."
                if not isinstance(scoring, Head)
                else f"The model is a {kind}, which has no classification head; load it with "
                "AutoModelForSequenceClassification."
            )
        self.trunk = None if reads_images(model) else trunk
        self.shares_prefix: bool | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits (M, V) at the scoring's M positions."""
        cache = None if batch.prefix is None else batch.prefix.cache(self, batch)
        return token_logits(self.model, batch, self.trunk, self.scoring.positions(batch), cache)

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C), -inf where a row has no such choice."""
        return self.scoring.class_logits(self.logits(batch), batch)

    def class_log_probs(self, batch: Batch) -> Tensor:
        """(B, K) log p(choice | question), float32; what K is of several labels, `scalabl.scoring.likelihood` says."""
        return self.scoring.likelihood.log_probs(self.class_logits(batch))

    @torch.no_grad()
    def with_trunk(self, batch: Batch, start: int | None = None) -> Batch:
        """The batch with the hidden states that enter a layer, computed here in the model's present state.

        Args:
            batch: the rows, of one particle.
            start: the layer; None for the lowest adapted one. A batch that begins there or above is left as it is, and
                so is every batch without a trunk, or of a model that cannot resume in the middle.
        """
        reads_packed(self.model, batch)  # tried here, where no particles and hooks are
        trunk = self.trunk
        if trunk is None:
            return batch
        start = trunk.depth if start is None else start
        if trunk.start_of(batch) >= start:
            return batch
        first = batch.select(torch.zeros(1, dtype=torch.long)) if batch.prefix is None else batch.prefix.batch
        if not trunk.resumes(self.model, first, start):
            return batch
        cache = None if batch.prefix is None else batch.prefix.below(self, start)
        return replace(batch, trunk=trunk.encode(self.model, batch, start, cache), start=start)

    def batches(self, rows: Sequence[Encoded], size: int) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Rows in batches of like length, longest first, with their indices; how the model reads them is tried."""
        order = longest_first(rows)
        if order:
            self.reads_packed(rows)
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            yield indices, [rows[i] for i in indices]

    def encoded_batches(self, rows: Sequence[Encoded], size: int) -> Iterator[tuple[list[int], Batch]]:
        """The same as tensors on the model's device, with the hidden states that enter the lowest adapted layer."""
        for indices, chunk in self.batches(rows, size):
            yield indices, self.with_trunk(self.scoring.collate(chunk).to(self.device))

    def reads_packed(self, rows: Sequence[Encoded]) -> bool:
        """Whether the model reads rows of this length as they are packed here.

        Raises:
            UserError: it reads a row otherwise beside others, or beside padding.
        """
        of_text = [row for row in rows if row.images is None]
        if not of_text:
            return True
        longest = max(of_text, key=lambda row: len(row.input_ids))
        batch = self.scoring.collate([replace(longest, trunk=None)]).to(self.device)
        if isinstance(self.scoring, Head):
            shortest = min(of_text, key=lambda row: len(row.input_ids))
            if len(shortest.input_ids) < len(longest.input_ids):
                tried = [replace(row, trunk=None) for row in (shortest, longest)]
                require_unread_padding(
                    self.model, [self._head_inputs([row]) for row in tried], self._head_inputs(tried)
                )
            reads_first_token(self.model, head_inputs(self.model, batch))
        return reads_packed(self.model, batch)

    def _head_inputs(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        return head_inputs(self.model, self.scoring.collate(rows).to(self.device))

    def check_packing(self, encoded: Encoded) -> None:
        """Refuse a model that does not honour the mask which keeps the choices of one row apart, or whose images are
        read in another way here than by the model itself, or that has no positions for the longest row of a head.

        Args:
            encoded: a row whose choices are of several tokens: what a single token says, no other choice can change.

        Raises:
            UserError: max_length is more than the model has positions for; scores are no numbers; the choices scored in
                one row and one by one differ, or one choice changes another's score; the logits behind images are not
                the model's own.
        """
        self._check_images(encoded)
        self._check_positions()
        if not isinstance(self.scoring, Continuation):
            return
        alone = []
        for number in range(1, encoded.num_choices + 1):
            kept = [i for i, segment in enumerate(encoded.segments) if segment in (0, number)]
            part = encoded.part(kept)
            segments = [min(segment, 1) for segment in part.segments]
            alone.append(replace(part, segments=segments, num_choices=1, answer=None, trunk=None))
        other_first = [
            encoded.input_ids[0] if segment == 1 else token
            for token, segment in zip(encoded.input_ids, encoded.segments, strict=True)
        ]
        with torch.no_grad():
            together, _ = choice_log_likelihoods(*self._scored([encoded]))
            apart, _ = choice_log_likelihoods(*self._scored(alone))
            changed, _ = choice_log_likelihoods(*self._scored([replace(encoded, input_ids=other_first)]))
        if not apart.isfinite().all():
            raise UserError("The model's scores are NaN or infinite; check its weights, its --dtype and --lora-alpha.")
        size = max(1.0, apart.abs().max().item())
        gap = (together[0] - apart[:, 0]).abs().max().item() / size
        leak = (together[0, 1:] - changed[0, 1:]).abs().max().item() / size
        # 8-bit matrix products look for outliers over the whole batch, which couples all tokens a little
        exact = TOLERANCE if getattr(self.model, "is_loaded_in_8bit", False) else 1e-3
        if not (gap <= TOLERANCE and leak <= exact):
            raise UserError(
                f"This model does not keep choices in one row apart (scores differ by {max(gap, leak):.1%}); load it "
                'with attn_implementation="sdpa" or "eager", or use --scoring letters.'
            )

    def _check_positions(self) -> None:
        room = learnt_positions(self.model) if isinstance(self.scoring, Head) else None
        if room is not None and self.scoring.max_length > room:
            raise UserError(
                f"max_length is {self.scoring.max_length}, but this {self.model.config.model_type} has learnt "
                f"positions for {room} tokens; give --max-length {room}."
            )

    def _check_images(self, encoded: Encoded) -> None:
        if encoded.images is None:
            return
        alone = encoded.part(slice(encoded.segments.count(0)))
        gap = gap_to_own_reading(self.model, self.scoring.collate([alone]).to(self.device))
        if not gap <= TOLERANCE:
            raise UserError(
                f"This model reads images in another way than is known here (logits differ by {gap:.2g} of their "
                "spread); use rows without images, or a Qwen-VL or Gemma-3 model."
            )

    def _scored(self, rows: Sequence[Encoded]) -> tuple[Tensor, Batch]:
        batch = self.scoring.collate(rows).to(self.device)
        return token_logits(self.model, batch, None, self.scoring.positions(batch)), batch


def longest_first(rows: Sequence[Encoded]) -> list[int]:
    """The rows' indices: those of like length stand together, and a memory limit shows itself at once."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))


@torch.no_grad()
def gap_to_own_reading(model: nn.Module, batch: Batch) -> float:
    """How far the logits behind a row's prompt are from those that the model gives with masks and positions of its
    own, in units of their spread.

    Args:
        model: an image-text model.
        batch: one row with images, not padded, of a prompt alone.
    """
    assert batch.images is not None
    ours = token_logits(model, batch, None)[:, -1].float()
    kinds = (batch.images.of > 0).int()
    own = {"token_type_ids": kinds} if batch.images.both_ways else {"mm_token_type_ids": kinds}
    pixels = {name: value for name, value in batch.images.pixels.items() if name != "counts"}
    mask = torch.ones_like(batch.input_ids)
    logits = model(input_ids=batch.input_ids, attention_mask=mask, use_cache=False, **own, **pixels).logits
    theirs = logits[:, -1].float()
    return float(((ours - theirs).abs().max() / theirs.std()).item())


def make_scoring(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Scoring:
    """The scoring that `Scoring.settings()` described, by this version or an older one."""
    kinds: dict[str, type[Scoring]] = {"letters": Letters, "continuation": Continuation, "text": Text, "head": Head}
    arguments = dict(settings)
    if arguments.get("chat"):
        arguments.setdefault("turn", "bare")
    if arguments.pop("raw_prompt", False):
        arguments.setdefault("template", AS_IT_IS)
    return kinds[arguments.pop("scoring")](tokenizer, **arguments)
