"""A model, a scoring and, where the lower layers are frozen, the trunk that is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.errors import UserError
from scalabl.scoring.base import Batch, Encoded, Scoring, attention_masks
from scalabl.scoring.continuation import Continuation, choice_log_likelihoods
from scalabl.trunk import Trunk


class Scorer:
    """Class logits of rows under the model's present state (mean, draws or particles).

    Args:
        model: a causal language model, with an adapter or without.
        scoring: how rows become class logits.
        trunk: the frozen lower layers, or None to run every layer every time.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, scoring: Scoring, trunk: Trunk | None = None) -> None:
        self.model: Any = model
        self.scoring = scoring
        self.trunk = trunk

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits (B, keep, V) of the last `batch.keep` positions."""
        return token_logits(self.model, batch, self.trunk)

    def class_logits(self, batch: Batch) -> Tensor:
        """(B, C), -inf where a row has no such choice."""
        return self.scoring.class_logits(self.logits(batch), batch)

    def class_log_probs(self, batch: Batch) -> Tensor:
        """(B, C) log p(choice | question), float32."""
        return self.class_logits(batch).log_softmax(dim=-1)

    @torch.no_grad()
    def with_trunk(self, batch: Batch) -> Batch:
        """The batch with the trunk's output, computed here if it is not there yet; unchanged without a trunk."""
        if self.trunk is None or batch.trunk is not None:
            return batch
        return replace(batch, trunk=self.trunk.encode(self.model, batch))

    def check_packing(self, encoded: Encoded, tolerance: float = 5e-2) -> None:
        """Refuse a model that does not honour the mask which keeps the choices of one row apart.

        Args:
            encoded: a row whose choices are of several tokens: what a single token says, no other choice can change.
            tolerance: relative, for rounding between a row of its own and a packed one.

        Raises:
            UserError: the choices scored in one row and one by one differ, or one choice changes another's score.
        """
        if not isinstance(self.scoring, Continuation):
            return
        alone = []
        for number in range(1, encoded.num_choices + 1):
            kept = [i for i, segment in enumerate(encoded.segments) if segment in (0, number)]
            alone.append(
                Encoded(
                    [encoded.input_ids[i] for i in kept],
                    [encoded.position_ids[i] for i in kept],
                    [min(encoded.segments[i], 1) for i in kept],
                    1,
                    None,
                )
            )
        other_first = [
            encoded.input_ids[0] if segment == 1 else token
            for token, segment in zip(encoded.input_ids, encoded.segments, strict=True)
        ]
        with torch.no_grad():
            together, _ = choice_log_likelihoods(*self._scored([encoded]))
            apart, _ = choice_log_likelihoods(*self._scored(alone))
            changed, _ = choice_log_likelihoods(*self._scored([replace(encoded, input_ids=other_first)]))
        size = max(1.0, apart.abs().max().item())
        gap = (together[0] - apart[:, 0]).abs().max().item() / size
        leak = (together[0, 1:] - changed[0, 1:]).abs().max().item() / size
        # 8-bit matrix products look for outliers over the whole batch, which couples all tokens a little
        exact = tolerance if getattr(self.model, "is_loaded_in_8bit", False) else 1e-3
        if not (gap <= tolerance and leak <= exact):
            raise UserError(
                f"This model does not keep choices in one row apart (scores differ by {max(gap, leak):.1%}); load it "
                'with attn_implementation="sdpa" or "eager", or use --scoring letters.'
            )

    def _scored(self, rows: Sequence[Encoded]) -> tuple[Tensor, Batch]:
        batch = self.scoring.collate(rows).to(self.device)
        return token_logits(self.model, batch, None), batch


def token_logits(model: torch.nn.Module, batch: Batch, trunk: Trunk | None) -> Tensor:
    """Logits (B, keep, V) of the last `keep` positions, from the cached trunk where the batch carries one."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    resume = trunk.resume(model, batch.trunk) if trunk is not None and batch.trunk is not None else nullcontext()
    with resume:
        return model(
            input_ids=batch.input_ids,
            attention_mask=attention_masks(batch, dtype, _text_config(model)),
            position_ids=batch.position_ids,
            logits_to_keep=batch.keep,
            use_cache=False,
        ).logits


def _text_config(model: torch.nn.Module) -> Any:
    """The configuration of the language model, inside a multimodal one too."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def batches(rows: Sequence[Encoded], size: int) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Rows in batches of like length, longest first (a memory limit shows itself at once), with their indices."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        yield indices, [rows[i] for i in indices]
