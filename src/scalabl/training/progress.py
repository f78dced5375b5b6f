"""Progress with time left, and the two ways a run is stopped early: Ctrl-C, and a second one."""

from __future__ import annotations

import signal
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalabl.core import processes
from scalabl.core.progress import progress_bar


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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = [
            f"{name} {logs[key]:.3g}"
            for key, name in (("loss", "loss"), ("kl", "KL"), ("sigma_mean", "sigma"))
            if logs and key in logs
        ]
        if self.progress and shown:
            self.progress.update(self.task, detail=", ".join(shown))

    def close(self) -> None:
        """Take the bar off the screen, however the run ended."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the step, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
