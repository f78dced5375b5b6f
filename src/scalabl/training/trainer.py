"""The Hugging Face Trainer with one method changed: the loss is that of the class, not of every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from scalabl.scoring import Batch, Encoded, Scoring
from scalabl.scoring.token_logits import token_logits
from scalabl.training.sampler import LengthGroupedOrder
from scalabl.training.whole_adapter import whole_adapter
from scalabl.trunk import Trunk


class ChoiceTrainer(Trainer):
    """Mean of -log p(answer | question) over the questions of a batch, each with its own draw of s.

    Args:
        scoring: how logits become class logits.
        trunk: the frozen lower layers, where their output is cached in the rows.
    """

    batch_class: type[Batch] = Batch

    def __init__(self, *args: Any, scoring: Scoring, trunk: Trunk | None = None, **kwargs: Any) -> None:
        kwargs["data_collator"] = lambda rows: collate(scoring, rows)
        super().__init__(*args, **kwargs)
        self.scoring = scoring
        self.trunk = trunk
        # our loss is a mean over the questions of a batch: the Trainer has to divide by the accumulation steps
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedOrder([len(row.input_ids) for row in rows], together, seed=self.args.data_seed or 0)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter alone: of shards (FSDP 2) the trained ones are gathered, never the frozen base."""
        model: Any = self.model
        tensors = whole_adapter(model)
        if tensors is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir, state_dict=tensors)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # the main process writes the trainer's state next, which says that the checkpoint is whole
        self.accelerator.wait_for_everyone()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = self.batch_class(**inputs)
        logits = token_logits(model, batch, self.trunk, self.scoring.positions(batch))
        class_logits = self.scoring.class_logits(logits, batch)
        loss = self.loss_of(class_logits, batch)
        return (loss, {"logits": class_logits}) if return_outputs else loss

    def loss_of(self, class_logits: Tensor, batch: Batch) -> Tensor:
        """The loss of class logits (B, C): -log p(answer | question), the mean over the batch."""
        return F.cross_entropy(class_logits, batch.answers)


def collate(scoring: Scoring, rows: Sequence[Encoded]) -> dict[str, Any]:
    """The fields of a batch, as the mapping that the Trainer moves between devices."""
    batch = scoring.collate(rows)
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
