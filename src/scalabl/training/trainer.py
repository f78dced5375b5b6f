"""The Hugging Face Trainer with another loss: that of the class, or of a text's trained tokens.

Questions with choices: mean of -log p(answer | question) over the questions of a batch; of several labels a row, of the
sum over them (`scalabl.scoring.likelihood`).

Under class weights (a classification head): mean of -w_y log p_w(y | x), with w of mean 1 over the training rows. The
ELBO is then that of as many rows in which label y is w_y times as often; likelihood and KL keep their sizes:

    1/N sum_i w_{y_i} E_q[-log p_w(y_i | x_i, s_i)] + KL(q || p) / N

Rows of text: the mean over all T = sum_i T_i trained tokens of the training set. The ELBO, divided by T, is

    1/T sum_i E_q[-sum_t log p(y_it | y_i<t, x_i, s_i)] + KL(q || p) / T                       [ScalaBL, the ELBO]

A step's share is the sum over the tokens of its n rows, divided by n T / N, the number that n of the N rows have on
average, and not by the batch's own number: so no row counts for more in a batch of short ones, and the objective of an
epoch is the same whatever the batch size, the order, and the number of accumulated batches or of processes.

Rows of like length share a batch, so that little of it is padding; what is saved are whole tensors that load in one
process.
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
from transformers import Trainer, TrainerCallback, TrainerState

from scalabl.core.modules import gathered
from scalabl.runs.settings import Settings
from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.head import Head
from scalabl.scoring.text import EncodedText, Text, TextBatch
from scalabl.scoring.trunk import Trunk, token_logits


class LengthGroupedOrder(Sampler[int]):
    """A seeded shuffle whose batches hold rows of like length; the order depends on (seed, epoch) alone.

    Rows are shuffled, cut into stretches of 50 batches, and sorted by length within each stretch; the batches of
    an epoch are then shuffled. Rows too few for another batch come last, where a data loader may drop them: they are
    taken from the shuffle, others in every epoch. A resumed run meets the same order, whatever random numbers were
    drawn before.

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
        batches = len(order) // self.batch_size
        whole, rest = order[: batches * self.batch_size], order[batches * self.batch_size :]
        stretch = 50 * self.batch_size
        rows: list[int] = []
        for start in range(0, len(whole), stretch):
            rows += sorted(whole[start : start + stretch], key=lambda i: self.lengths[i])
        for i in torch.randperm(batches, generator=generator).tolist():
            yield from rows[i * self.batch_size : (i + 1) * self.batch_size]
        yield from rest


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
        self.order: LengthGroupedOrder | None = None
        self.add_callback(_EpochOfTheOrder(self))
        # our loss is a mean over the questions of a batch: the Trainer has to divide by the accumulation steps
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows: Any = train_dataset if train_dataset is not None else self.train_dataset
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.order = LengthGroupedOrder([len(row.input_ids) for row in rows], together, seed=self.args.data_seed or 0)
        return self.order

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
        return self.scoring.likelihood.loss(class_logits, batch.answers)


class _EpochOfTheOrder(TrainerCallback):  # type: ignore[misc]
    """Tells the order which epoch begins: past the wrappers that several processes and a resumed epoch put around it
    nothing else does."""

    def __init__(self, trainer: ChoiceTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if self.trainer.order is not None:
            self.trainer.order.set_epoch(int(state.epoch or 0))


class WeightedTrainer(ChoiceTrainer):
    """Mean of -w_y log p_w(y | x) of a head under class weights.

    It is not divided by the weights of a batch, by which a row would count for more beside others.
    """

    scoring: Head

    def loss_of(self, class_logits: Tensor, batch: Batch) -> Tensor:
        """The loss of class logits (B, C), which are those of p in proportion to p_w / w."""
        return weighted_nll(class_logits, batch.answers, self.scoring.weights(class_logits.device))


def weighted_nll(class_logits: Tensor, answers: Tensor, weights: Tensor) -> Tensor:
    """Mean of -w_y log p_w(y | x), with p_w in proportion to w p; lowest where p is the frequency of answers.

    Args:
        class_logits: (B, C) of p.
        answers: (B,).
        weights: (C,) w.
    """
    nll = F.cross_entropy(class_logits + weights.log(), answers, reduction="none")
    return (weights[answers] * nll).mean()


class LanguageTrainer(ChoiceTrainer):
    """Mean of -log p(token | what is before it) over the trained tokens, each row with its own draw of s."""

    batch_class = TextBatch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows: Any = self.train_dataset
        self.tokens_a_row = tokens_a_row(rows)

    def loss_of(self, class_logits: Tensor, batch: Batch) -> Tensor:
        """The loss of the rows' log-likelihoods (B, 1), which `Text` has for class logits."""
        return -class_logits.sum() / (len(batch) * self.tokens_a_row)


def trainer_of(scoring: Scoring) -> type[ChoiceTrainer]:
    """The trainer of a kind of rows."""
    if isinstance(scoring, Head) and scoring.class_weights is not None:
        return WeightedTrainer
    return LanguageTrainer if isinstance(scoring, Text) else ChoiceTrainer


def weighing_the_kl(settings: Settings, rows: Sequence[Encoded]) -> Settings:
    """The settings that a method's callbacks are made of, for as many examples as there are rows.

    A loss that is a mean over tokens is 1/T of the rows' sum, where a method expects 1/N of it: with
    `kl_normalization="token"` its KL is multiplied by N/T, so that it weighs KL / T, which is the exact ELBO.
    "sequence" leaves it at KL / N, as if a row were one observation: T/N times the ELBO's weight.
    """
    if not isinstance(rows[0], EncodedText) or settings.posterior.kl_normalization == "sequence":
        return settings
    return settings.changed(beta=settings.posterior.beta / tokens_a_row(rows))


def tokens_a_row(rows: Sequence[Encoded]) -> float:
    """T/N: how many trained tokens a row has on average."""
    return token_counts(rows)["trained"] / len(rows)


def token_counts(rows: Sequence[Encoded]) -> dict[str, int]:
    """How many tokens rows of text have, how many of them are trained on, and how many rows lost their beginning."""
    texts = [row for row in rows if isinstance(row, EncodedText)]
    return {
        "all": sum(len(row.input_ids) for row in texts),
        "trained": sum(row.trained for row in texts),
        "cut_rows": sum(row.cut for row in texts),
    }


def collate(scoring: Scoring, rows: Sequence[Encoded]) -> dict[str, Any]:
    """The fields of a batch, as the mapping that the Trainer moves between devices."""
    batch = scoring.collate(rows)
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


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
