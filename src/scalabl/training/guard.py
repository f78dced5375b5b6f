"""NonFiniteGuard: stops a run at the first NaN or Inf, before it reaches a weight or a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalabl.core.errors import UserError
from scalabl.core.modules import base_name, gathered


class NonFiniteError(UserError):
    """A NaN or an infinity in training.

    Attributes:
        step: the optimiser step it was met in, counted from 1.
        parameter: the name of the first parameter, in the model's order, that is not finite or has such a gradient;
            None if only the loss is not finite.
    """

    def __init__(self, message: str, *, step: int, parameter: str | None) -> None:
        super().__init__(message)
        self.step = step
        self.parameter = parameter


class NonFiniteGuard(TrainerCallback):
    """Checks gradients before each optimiser step, parameters before each checkpoint, and the loss of each log.

    The check of a step is the norm of all gradients, one number fetched from the device. (Trainer hides a NaN of the
    loss from its log unless logging_nan_inf_filter is False.) It stands after
    `ELBOCallback` in the list of callbacks, so that the KL's gradient is looked at too. Under fp16 with a loss scaler
    infinite gradients are part of the search for a scale: the scaler skips such a step, and this guard leaves them to
    it.

    Raises:
        NonFiniteError: in training, naming the step and the layer; the step is not taken and nothing is saved.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if _has_loss_scaler(kwargs["optimizer"]):
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if gradients and not _norm_is_finite(gradients):
            _stop(kwargs["model"], step=state.global_step + 1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss")
        if isinstance(loss, float) and not math.isfinite(loss) and not _has_loss_scaler(kwargs["optimizer"]):
            raise NonFiniteError(
                f"Training stopped at step {state.global_step}: the loss since the last log is NaN or infinite, while "
                "every gradient is finite; look for a batch without a trained token.",
                step=state.global_step,
                parameter=None,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._check_before_saving(state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check_before_saving(state, control, kwargs["model"])

    def _check_before_saving(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if control.should_save and not _norm_is_finite([p for p in model.parameters() if p.requires_grad]):
            _stop(model, step=state.global_step)


def _has_loss_scaler(optimizer: Optimizer) -> bool:
    scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
    return scaler is not None and scaler.is_enabled()


@torch.no_grad()
def _norm_is_finite(tensors: Iterable[Tensor]) -> bool:
    norm = get_total_norm([tensor.detach() for tensor in tensors])
    return bool(torch.isfinite(gathered(norm)).item())


def _is_finite(tensor: Tensor | None) -> bool:
    # the norm of a finite float16 or bfloat16 tensor may overflow: this looks at the numbers
    return tensor is None or bool(gathered(tensor).isfinite().all().item())


def _stop(model: nn.Module, *, step: int) -> None:
    """Raise the error that names the culprit; nothing happens if every number is finite (only the norm overflowed)."""
    # parameters first: clipping by a norm of NaN has turned every gradient into NaN, the parameter is the cause
    for what, pick in (("weight", lambda p: p.detach()), ("gradient", lambda p: p.grad)):
        bad = [name for name, p in model.named_parameters() if p.is_floating_point() and not _is_finite(pick(p))]
        if bad:
            name = base_name(bad[0])
            others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise NonFiniteError(
                f"Training stopped at step {step}: the {what} of {name}{others} is NaN or infinite; resume from the "
                "last checkpoint with a lower learning rate, or look for a row without a trained token.",
                step=step,
                parameter=name,
            )
