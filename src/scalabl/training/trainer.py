"""An adapter's weights as whole tensors, wherever they are: what is saved loads in one process.

The order of training rows: rows of like length share a batch, so that little of it is padding.

The Hugging Face Trainer with one method changed: the loss is that of the class, not of every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer

from scalabl.core.modules import gathered
from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.trunk import Trunk, token_logits


def whole_adapter(model: PeftModel) -> dict[str, Tensor] | None:
    """The trained weights, gathered where they are shards (FSDP 2, ZeRO-3); None where PEFT finds them whole by itself.

    Every process has to call it, each gets all of them; the frozen base is not gathered.

    Args:
        model: the model, sharded or not.

    Returns:
        parameter name -> the tensor, on the CPU.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):  # DeepSpeed has left empty tensors
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(list(trained.values())):
            return {name: p.detach().cpu().clone() for name, p in trained.items()}
    if not any(hasattr(parameter, "full_tensor") for parameter in trained.values()):
        return None
    return {name: gathered(p.detach()).cpu() for name, p in trained.items()}


class LengthGroupedOrder(Sampler[int]):
    """A seeded shuffle whose batches hold rows of like length; the order depends on (seed, epoch) alone.

    Rows are shuffled, cut into stretches of 50 batches, and sorted by length within each stretch; the batches of
    an epoch are then shuffled. A resumed run meets the same order, whatever random numbers were drawn before.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimiser step on all devices.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        stretch = 50 * self.batch_size
        rows: list[int] = []
        for start in range(0, len(order), stretch):
            rows += sorted(order[start : start + stretch], key=lambda i: self.lengths[i])
        groups = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # a last, smaller group stays last, where the data loader drops it
        whole, rest = [g for g in groups if len(g) == self.batch_size], [g for g in groups if len(g) < self.batch_size]
        for i in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[i]
        for group in rest:
            yield from group


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
