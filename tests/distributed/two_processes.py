"""Runs on tiny models in several processes started by `accelerate launch`: what the tests here share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_base import tiny_encoder, write_texts

import scalabl
from scalabl.runs.settings import Settings
from scalabl.training.monitors import StopOnInterrupt

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "recipes" / "accelerate"
STEPS = 12


def settings_of(work: Path, **changes: Any) -> Settings:
    """Twelve steps on `work`/base and `work`/task, a checkpoint after every fourth, within epochs of three; the trunk
    below is frozen."""
    settings: dict[str, Any] = {
        "model": str(work / "base"),
        "data": str(work / "task"),
        "steps": STEPS,
        "save_steps": 4,
        "r": 4,
        "learning_rate": 1e-2,
        "validation_rows": 4,
        "layers": "last:2",
    }
    return Settings.flat(**{**settings, **changes})


def head_settings_of(work: Path, **changes: Any) -> Settings:
    """The same of a classification head on `work`/encoder and `work`/texts, which `write_head` has written."""
    return settings_of(work, model=str(work / "encoder"), data=str(work / "texts"), validation_rows=20, **changes)


def write_head(work: Path) -> None:
    """An encoder without dropout, whose masks several processes draw otherwise than one."""
    shutil.copytree(tiny_encoder(), work / "encoder")
    config = json.loads((work / "encoder" / "config.json").read_text())
    without = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    (work / "encoder" / "config.json").write_text(json.dumps(config | without))
    write_texts(work / "texts", validation=24)


def command(config: str, *program: str) -> list[str]:
    """`accelerate launch` of a script, or of a module after "-m", in two processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", *program]


def environment() -> dict[str, str]:
    source = str(Path(scalabl.__file__).parents[1])
    paths = [source, str(HERE), str(HERE.parent)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}


def launch(config: str, *program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *program), env=environment(), capture_output=True, text=True)


def launcher_environment(config: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes by a configuration of recipes/accelerate."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser, prepare_multi_gpu_env

    settings = launch_command_parser().parse_args([*command(config)[3:], "script.py"])
    return {**environment(), **prepare_multi_gpu_env(_validate_launch_command(settings)[0])}


class Killed(BaseException):
    """As sudden as a kill, but in this process."""


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """Within it, every process of a run dies after a step."""
    original = StopOnInterrupt.on_step_end

    def on_step_end(self: StopOnInterrupt, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Killed
        original(self, args, state, control, **kwargs)

    StopOnInterrupt.on_step_end = on_step_end  # type: ignore[method-assign]
    try:
        yield
    except Killed:
        pass
    finally:
        StopOnInterrupt.on_step_end = original  # type: ignore[method-assign]
