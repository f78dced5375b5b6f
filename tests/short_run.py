"""A training run of seconds, and what is compared between two of them."""

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from own_process import OwnProcess

from scalabl.core.files import ADAPTER, sha256
from scalabl.runs.settings import Settings
from scalabl.training.run import train

STEPS = 30


def settings_of(base: Path, task: Path, **changes: Any) -> Settings:
    """A dozen steps an epoch or less, checkpoints every 5 steps."""
    settings: dict[str, Any] = {
        "model": str(base),
        "data": str(task),
        "steps": STEPS,
        "batch_size": 4,
        "save_steps": 5,
        "r": 4,
        "scoring": "continuation",
        "normalization": "token",
        "learning_rate": 1e-2,
        "validation_rows": 4,
        "layers": "last:2",
    }
    return Settings.flat(**{**settings, **changes})


def weights(run: Path) -> str:
    """What the final weights hash to."""
    return sha256(run / ADAPTER)


def start(settings: Settings, run: Path) -> OwnProcess:
    """`train` in a process of its own."""
    return OwnProcess(train, settings, run)


def send_at_checkpoint(process: OwnProcess, run: Path, sign: signal.Signals) -> None:
    """Send a signal as soon as the run has a checkpoint, long before its last step."""
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/checkpoint-*/trainer_state.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"no checkpoint was written; the process ended with {process.returncode}")
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(sign)
    process.wait(timeout=60)
