"""Callbacks beside the ELBO: values in the Trainer's log, progress, the two ways to stop a run early, NaN and Inf.

`Trainer.log` builds a dict, appends a copy to `state.log_history`, and hands the dict to its callbacks in order, where
TensorBoard, W&B and the others stand before any callback of the user: what those add in `on_log` is never reported.
So a `LogContributor` goes to the front of its trainer's list. A trainer hands that list to no callback, but the handler
that has it is what calls the callback: it is found among the callers.
"""

from __future__ import annotations

import inspect
import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from scalabl.core import processes
from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.modules import base_name, gathered
from scalabl.tuner.diagnostics import PREFIX


class LogContributor(TrainerCallback, ABC):
    """A callback whose `log_values` are in every training log: in `state.log_history` and in every reporter.

    Their names begin with "elbo/", since a trainer may log a "kl" of its own (TRL's KTO does).
    """

    @abstractmethod
    def log_values(self, logs: dict[str, Any]) -> dict[str, float]:
        """The values to add to `logs`, a training log (it has "loss"), by their names without "elbo/"."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go first, before there is anything to log."""
        frame = calling_frame(CallbackHandler)
        handler = None if frame is None else frame.f_locals["self"]
        if handler is not None and self in handler.callbacks:
            # those behind are still to be called, and keep their places
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the values to `logs` and to the newest entry of the log history."""
        if not logs or "loss" not in logs:  # an evaluation, or the run's summary
            return
        values = {f"{PREFIX}{name}": value for name, value in self.log_values(logs).items()}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)


def calling_frame(kind: type) -> FrameType | None:
    """The nearest call of a method of this kind from which a callback is called; None if something else called it."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return frame


def finite(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A log that JSON can hold: None for a number that is NaN or infinite.

    The norm of the gradients is one where a loss scaler searches its scale, or where a norm alone overflows.
    """
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in logs.items()}
        for logs in log
    ]


class ProgressBar(TrainerCallback):
    """A progress bar of training steps with the last logged losses.

    Args:
        description: what stands in front.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress = progress_bar()
        self.task = self.progress.add_task(
            self.description, total=state.max_steps, completed=state.global_step, detail=""
        )
        self.progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        words = {"loss": "loss", f"{PREFIX}kl": "KL", f"{PREFIX}sigma_mean": "sigma"}
        shown = [f"{word} {logs[key]:.3g}" for key, word in words.items() if key in logs]
        if self.progress and shown:
            self.progress.update(self.task, detail=", ".join(shown))

    def close(self) -> None:
        """Take the bar off the screen, however the run ended."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        try:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not the main thread: whoever runs it handles signals
            self._previous = None

    def _handle(self, signum: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a signal reaches several processes at different steps; they have to stop at the same one
        self.interrupted = processes.anywhere(self.interrupted)
        if self.interrupted and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Give the signal back to who had it."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


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
    loss from its log unless logging_nan_inf_filter is False.) It stands after `ELBOCallback` in the list of callbacks,
    so that the KL's gradient is looked at too. Under fp16 with a loss scaler infinite gradients are part of the search
    for a scale: the scaler skips such a step, and this guard leaves them to it.

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
        # parameters are looked at before each checkpoint
        if control.should_save and not _norm_is_finite([p for p in kwargs["model"].parameters() if p.requires_grad]):
            _stop(kwargs["model"], step=state.global_step)

    on_epoch_end = on_step_end


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
