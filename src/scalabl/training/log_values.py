"""Values that a callback adds to the Trainer's log before anything reports it.

`Trainer.log` builds a dict, appends a copy to `state.log_history`, and hands the dict to its callbacks in order, where
TensorBoard, W&B and the others stand before any callback of the user: what those add in `on_log` is never reported.
A callback is given no handle on the trainer through which it could go first, so `CallbackHandler.on_log` is wrapped,
once in a process; a handler without a `LogContributor` among its callbacks behaves as before.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class LogContributor(TrainerCallback, ABC):
    """A callback whose `log_values` are in every training log: in `state.log_history` and in every reporter."""

    def __init__(self) -> None:
        _let_contributors_go_first()

    @abstractmethod
    def log_values(self, logs: dict[str, Any]) -> dict[str, float]:
        """The values to add to `logs`, a training log (it has "loss")."""

    def contribute(self, state: TrainerState, logs: dict[str, Any] | None) -> None:
        """Add the values to `logs` and to the newest entry of the log history."""
        if not logs or "loss" not in logs:  # an evaluation, or the run's summary
            return
        values = self.log_values(logs)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)


def _let_contributors_go_first() -> None:
    original = CallbackHandler.on_log
    if getattr(original, "contributors_go_first", False):
        return

    @functools.wraps(original)
    def on_log(
        self: CallbackHandler,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> TrainerControl:
        for callback in self.callbacks:
            if isinstance(callback, LogContributor):
                callback.contribute(state, logs)
        return original(self, args, state, control, logs, **kwargs)

    on_log.contributors_go_first = True  # type: ignore[attr-defined]
    CallbackHandler.on_log = on_log  # type: ignore[method-assign]


def finite(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A log that JSON can hold: None for a number that is NaN or infinite.

    The norm of the gradients is one where a loss scaler searches its scale, or where a norm alone overflows.
    """
    return [
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in logs.items()}
        for logs in log
    ]
