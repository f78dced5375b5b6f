"""Values that a callback adds to the Trainer's log before anything reports it.

`Trainer.log` builds a dict, appends a copy to `state.log_history`, and hands the dict to its callbacks in order, where
TensorBoard, W&B and the others stand before any callback of the user: what those add in `on_log` is never reported.
So a contributor goes to the front of its trainer's list. A trainer hands that list to no callback, but the handler that
has it is what calls the callback: it is found among the callers.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class LogContributor(TrainerCallback, ABC):
    """A callback whose `log_values` are in every training log: in `state.log_history` and in every reporter."""

    @abstractmethod
    def log_values(self, logs: dict[str, Any]) -> dict[str, float]:
        """The values to add to `logs`, a training log (it has "loss")."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go first, before there is anything to log."""
        handler = _calling_handler()
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
        values = self.log_values(logs)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)


def _calling_handler() -> CallbackHandler | None:
    """The handler that called the callback from which this is called; None if something else did."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def finite(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A log that JSON can hold: None for a number that is NaN or infinite.

    The norm of the gradients is one where a loss scaler searches its scale, or where a norm alone overflows.
    """
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in logs.items()}
        for logs in log
    ]
