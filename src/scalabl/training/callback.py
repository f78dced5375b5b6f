"""ELBOCallback: turns any Trainer's likelihood training into stochastic variational inference.

The trainer minimises mean_i -log p(y_i | x_i, s) with s drawn in the forward pass (the reparameterised gradient of
the expected log-likelihood); this callback adds the gradient of KL(q || p) / N, which a Gaussian has in closed form.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sized
from typing import Any, Literal, Self

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from scalabl.core.errors import UserError
from scalabl.core.modules import gathered
from scalabl.posterior.gaussian import DiagonalGaussian, Gaussian, Prior
from scalabl.training.kl import SCHEDULES, Schedule, add_kl_gradients, kl_weight, with_parameters
from scalabl.training.monitors import LogContributor, calling_frame
from scalabl.training.parameter_group import VariationalGroup, innermost
from scalabl.training.ranks import share_noise
from scalabl.training.refusals import (
    refuse_drawn_reference,
    refuse_flattened_batches,
    refuse_hidden_gradients,
    refuse_ratios_of_draws,
    refuse_untrained,
)
from scalabl.tuner.layers import active_adapters, prior_of, require_live, stochastic_layers, unwrap
from scalabl.tuner.projection import State, StochasticProjection, untrained

_IGNORED = -100  # labels that are not trained on


class ELBOCallback(LogContributor):
    """The KL of the ELBO for `transformers.Trainer` and every trainer built on it.

    Once an optimiser step, after gradient clipping and after the ranks' gradients are averaged, the closed-form
    gradient of weight * KL(q || p) is added to the variational parameters' gradients. It is thus not multiplied by
    gradient accumulation, batch size, ranks or fp16's loss scale. Where clipping has shortened the likelihood's
    gradient, the KL's is shortened by the same factor: the step is then a shorter one along the gradient of the same
    ELBO, not one along an ELBO with a heavier KL. Every training log gains "elbo/kl" (of
    q from p in nats after the step, whichever is trained on), "elbo/nll" (the trainer's loss), "elbo/kl_weight" (of the
    last step), "elbo/sigma_mean" and "elbo/s_mean" (means over all numbers of all layers of the posterior std and of
    |mean|).

    An adapter that is frozen or inactive when training begins gives its mean until it ends, however it is switched to:
    the reference of TRL's DPO and KTO.

    With several data-parallel ranks the draws of s are those that one process would make for the same global batch,
    each rank taking its rows (`scalabl.training.ranks`); with dropout each rank has a stream of its own instead.

    Args:
        num_examples: N, the number of terms that the trainer's loss is a mean of over one epoch. For a loss that is
            a mean over rows it is the number of training rows; for a mean over tokens (Trainer's and SFTTrainer's
            default for causal language models) the number of trained tokens of the training set (`for_tokens`); for
            Transformers' own loss of several labels a row, a mean over rows and labels, rows times labels.
        beta: multiplier of the KL, at least 0; 1 is the ELBO.
        schedule: "elbo" (KL / N at every step), "warmup" (linear from 0 to KL / N) or "minibatch" (the paper's
            pi_i, KL / N on average); see `scalabl.training.kl`.
        warmup_fraction: fraction of all optimiser steps over which "warmup" rises.
        cycle: optimiser steps of one cycle of "minibatch"; an epoch if None.
        learning_rate: learning rate of the variational parameters at a schedule factor of 1 (the trainer's own LR
            schedule multiplies it); None leaves them at the trainer's. They never get weight decay.
        kl: "reverse" is the ELBO's KL(q || p); "forward" is KL(p || q), the reference code's, kept for comparison.
        adapter: the adapter's name; the active ones if None.

    Raises:
        UserError: a value out of range. At the start of training: no stochastic layer, frozen or unknown to the
            optimiser; an adapter that is merged or disabled; an engine that hides gradients (DeepSpeed, FSDP 1,
            optimisers that update during backward);
            packed or padding-free batches; a loss that compares draws with each other (TRL's GRPO and its kin);
            "minibatch" over a data set without length and no `cycle`.
    """

    def __init__(
        self,
        num_examples: int,
        *,
        beta: float = 1.0,
        schedule: Schedule = "elbo",
        warmup_fraction: float = 0.1,
        cycle: int | None = None,
        learning_rate: float | None = 2e-2,
        kl: Literal["reverse", "forward"] = "reverse",
        adapter: str | None = None,
    ) -> None:
        self.num_examples = _positive_integer(
            num_examples, "num_examples", "the number of training rows (or of trained tokens)"
        )
        if not (math.isfinite(beta) and beta >= 0):
            raise UserError(f"beta is {beta}, but the KL's multiplier cannot be negative; 1.0 is the ELBO.")
        if schedule not in SCHEDULES:
            raise UserError(f"The KL schedule {schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}.")
        if not 0 <= warmup_fraction <= 1:
            raise UserError(f"warmup_fraction is {warmup_fraction}, but it is a fraction of the run: 0 to 1.")
        if learning_rate is not None and not (math.isfinite(learning_rate) and learning_rate > 0):
            raise UserError(
                f"learning_rate is {learning_rate}, but the variational parameters need a positive one; 2e-2 is the "
                "usual choice, None keeps the trainer's."
            )
        if kl not in ("reverse", "forward"):
            raise UserError(f"kl is {kl!r}; it must be reverse, KL(q || p) as in the ELBO, or forward, KL(p || q).")
        self.kl = kl
        self.beta = float(beta)
        self.schedule: Schedule = schedule
        self.warmup_fraction = warmup_fraction
        self.cycle = None if cycle is None else _positive_integer(cycle, "cycle", "a number of optimiser steps")
        self.learning_rate = learning_rate
        self.adapter = adapter
        self._leaves: list[StochasticProjection] = []
        self._still: list[tuple[StochasticProjection, State]] = []
        self._posteriors: dict[str, Gaussian] = {}
        self._prior = Prior()
        self._group: VariationalGroup | None = None
        self._cycle = 1
        self._last_weight = 0.0

    @classmethod
    def for_tokens(cls, dataset: Iterable[Mapping[str, Any]], **options: Any) -> Self:
        """The callback of the exact ELBO for a loss that is a mean over tokens: N is the number of trained tokens.

            trainer = SFTTrainer(model, arguments, train_dataset=rows)
            trainer.add_callback(ELBOCallback.for_tokens(trainer.train_dataset))

        `ELBOCallback(len(rows))` weighs the KL as if a whole sequence were one observation instead: as many times
        heavier as a sequence has trained tokens, with posteriors that stay closer to the prior.

        Args:
            dataset: tokenised rows with "labels", -100 where a token is not trained on.
            options: the callback's other arguments.

        Raises:
            UserError: rows without labels, without length, or without a trained token.
        """
        return cls(count_trained_tokens(dataset), **options)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        refuse_drawn_reference(args, kwargs["model"])
        keep_float32(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer, dataloader = kwargs["model"], kwargs["optimizer"], kwargs.get("train_dataloader")
        refuse_ratios_of_draws(args)
        self._restore()
        require_live(model)
        leaves = stochastic_layers(model, self.adapter)
        self._leaves = list(leaves.values())
        self._posteriors = {name: leaf.posterior for name, leaf in leaves.items()}
        priors = {
            prior_of(model, name) for name in ([self.adapter] if self.adapter else active_adapters(unwrap(model)))
        }
        if len(priors) > 1:
            raise UserError(
                "The active adapters have different priors; train one at a time, ELBOCallback(adapter=...)."
            )
        self._prior = priors.pop()
        diagonal = all(isinstance(posterior, DiagonalGaussian) for posterior in self._posteriors.values())
        if self.kl == "forward" and (self._prior.empirical or not diagonal):
            raise UserError(
                'kl="forward" is for a diagonal covariance and a fixed prior, as in the reference code; use '
                'kl="reverse".'
            )
        refuse_hidden_gradients(args, model, optimizer)
        refuse_flattened_batches(args, dataloader)
        keep_float32(model, optimizer)
        trainable = self._trainable()
        refuse_untrained(optimizer, trainable)
        if _counts_rows_for_tokens(self.num_examples, getattr(dataloader, "dataset", None)):
            warnings.warn(
                f"num_examples is {self.num_examples:,}, the number of rows, but their loss is a mean over tokens, so "
                "that the KL weighs as many times too much as a row has trained tokens; "
                "ELBOCallback.for_tokens(trainer.train_dataset) counts them.",
                stacklevel=2,
            )
        self._cycle = self._cycle_steps(args, dataloader)
        self._group = VariationalGroup(
            optimizer,
            [parameter for _, parameter in trainable],
            learning_rate=self.learning_rate,
            base_learning_rate=args.learning_rate,
        )
        share_noise(args, model, self._leaves)
        # TRL's use_adapter("ref") makes the reference's parameters trainable while it is read
        self._still = [(leaf, leaf.state) for leaf in untrained(model)]
        for leaf, _ in self._still:
            leaf.state = "mean"

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        weight = kl_weight(
            self.schedule,
            state.global_step,
            num_examples=self.num_examples,
            total_steps=state.max_steps,
            cycle=self._cycle,
            warmup_fraction=self.warmup_fraction,
            beta=self.beta,
        )
        self._last_weight = weight
        if weight == 0:
            return
        _unscale(kwargs["optimizer"])
        add_kl_gradients(self._posteriors.values(), self._prior, weight * clipping_factor(args), self.kl)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._restore()
        for leaf in self._leaves:
            leaf.share = (0, 1)

    @torch.no_grad()
    def log_values(self, logs: dict[str, Any]) -> dict[str, float]:
        whole = [_whole(posterior) for posterior in self._posteriors.values()]
        if not whole:
            return {}
        device = whole[0].log_mean.device
        kl = torch.stack([posterior.kl(self._prior).to(device) for posterior in whole]).sum()
        sigma = torch.cat([posterior.marginal_std().to(device) for posterior in whole]).mean()
        s = torch.cat([posterior.mean.to(device) for posterior in whole]).abs().mean()
        kl_value, sigma_value, s_value = torch.stack([kl, sigma, s]).tolist()  # one transfer
        return {
            "kl": kl_value,
            "nll": float(logs["loss"]),
            "kl_weight": self._last_weight,
            "sigma_mean": sigma_value,
            "s_mean": s_value,
        }

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, parameter)
            for name, posterior in self._posteriors.items()
            for parameter in posterior.parameters()
            if parameter.requires_grad
        ]

    def _cycle_steps(self, args: TrainingArguments, dataloader: Any) -> int:
        if self.schedule != "minibatch":
            return 1
        if self.cycle is not None:
            return self.cycle
        try:
            return max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
        except TypeError:
            raise UserError(
                'The schedule "minibatch" cycles over an epoch, but the training data has no length; give '
                "ELBOCallback a cycle in optimiser steps."
            ) from None

    def _restore(self) -> None:
        if self._group is not None:
            self._group.remove()
            self._group = None
        for leaf, state in self._still:
            leaf.state = state
        self._still = []


def keep_float32(model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Bring every posterior back to float32, and what an optimiser has kept of it.

    On a quantised base TRL's trainers cast all that is trained to bfloat16 by `param.data`, past what a module can
    refuse; steps of mean and sigma are finer than bfloat16 is.
    """
    state = {} if optimizer is None else innermost(optimizer).state
    for leaf in (module for module in model.modules() if isinstance(module, StochasticProjection)):
        for parameter in leaf.posterior.parameters():
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
                kept = state.get(parameter, {})
                kept |= {k: v.float() for k, v in kept.items() if torch.is_tensor(v) and v.is_floating_point()}


def clipping_factor(args: TrainingArguments) -> float:
    """What the trainer that calls the callback has just multiplied every gradient by: min(1, max_grad_norm / norm).

    The norm is a local of the trainer's method that takes the step, which it passes on to nobody. 1 where nothing is
    clipped, where another kind of trainer calls, and where the norm is no number, as in a step that fp16 skips.
    """
    most = args.max_grad_norm or 0.0
    frame = calling_frame(Trainer) if most > 0 else None
    norm = None if frame is None else frame.f_locals.get("grad_norm")
    length = math.nan if norm is None else float(norm)
    # with torch's guard against a norm of zero
    return min(1.0, most / (length + 1e-6)) if math.isfinite(length) else 1.0


def _unscale(optimizer: Optimizer) -> None:
    """Divide the gradients by fp16's loss scale now, unless clipping has: what comes later would be divided too."""
    scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
    if scaler is None or not scaler.is_enabled():
        return
    try:
        scaler.unscale_(innermost(optimizer))
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise


def _whole(posterior: Gaussian) -> Gaussian:
    """The posterior with whole tensors where its parameters are shards (FSDP 2); itself otherwise."""
    if not any(hasattr(parameter, "full_tensor") for parameter in posterior.parameters()):
        return posterior
    return with_parameters(posterior, {name: gathered(p) for name, p in posterior.named_parameters()})


def _positive_integer(value: Any, name: str, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise UserError(f"{name} is {value!r}, but it must be {what}, at least 1.")
    return number


def _counts_rows_for_tokens(num_examples: int, dataset: Any) -> bool:
    """Whether N is the number of a data set's rows, which have a label a token; the first row stands for all."""
    if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__") and num_examples == len(dataset)):
        return False
    row = dataset[0]
    tokens, labels = (row.get(name) if isinstance(row, Mapping) else None for name in ("input_ids", "labels"))
    if tokens is None or labels is None or np.ndim(labels) != 1 or np.shape(labels) != np.shape(tokens):
        return False
    return count_trained_tokens([{"labels": labels}]) > 1


def count_trained_tokens(dataset: Iterable[Mapping[str, Any]]) -> int:
    """The labels that are not -100, each row's first one left out: nothing predicts it.

    Args:
        dataset: rows with "labels", for example `SFTTrainer.train_dataset`.

    Raises:
        UserError: rows without labels, a stream without length, or no trained token at all.
    """
    if not isinstance(dataset, Sized):
        raise UserError(
            "The training data is a stream without length, so its trained tokens cannot be counted; give ELBOCallback "
            "their number as num_examples."
        )
    columns = getattr(dataset, "column_names", None)
    if columns and "labels" in columns:
        dataset = dataset.select_columns("labels")  # type: ignore[attr-defined]
    total = 0
    for row in dataset:
        if "labels" not in row:
            raise UserError(
                'The training rows have no "labels" to count; give the data set that the trainer made of them, '
                "SFTTrainer.train_dataset, or the number of trained tokens as num_examples."
            )
        total += int((np.asarray(row["labels"])[1:] != _IGNORED).sum())
    if total == 0:
        raise UserError("No label of the training rows is trained on: all of them are -100; look at the masks.")
    return total
