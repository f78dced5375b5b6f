"""`scalabl train` in several processes: what the launcher set up is checked before any work, and checkpoints are moved
between numbers of processes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.runs.registry import METHODS
from scalabl.runs.settings import Settings


def check_launch(settings: Settings) -> None:
    """Refuse what `accelerate launch` set up where a run with these settings would fail or be another one.

    Raises:
        UserError: DeepSpeed is not installed or would hide the KL's gradient; an FSDP setting that this package does
            not train with.
    """
    if processes.uses_deepspeed():
        if importlib.util.find_spec("deepspeed") is None:
            raise UserError(
                "DeepSpeed is not installed; pip install deepspeed, or launch with recipes/accelerate/fsdp2.yaml."
            )
        if METHODS[settings.method].variational:
            raise UserError(
                f"DeepSpeed keeps gradients to itself, so the KL of {settings.method} cannot be added to them; launch "
                "with recipes/accelerate/fsdp2.yaml or ddp.yaml."
            )
    if not processes.is_sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("The first version of FSDP flattens the posterior into other weights; set fsdp_version to 2.")
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise UserError(
            "Under FSDP mixed_precision would round the posterior; set it to no, --dtype bfloat16 is of the base alone."
        )
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") == "true":
        raise UserError(
            "fsdp_activation_checkpointing draws other noise in the backward pass than in the forward pass; set it to "
            "false and use --gradient-checkpointing."
        )
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false") == "true":
        raise UserError("Every process reads the base by itself; set fsdp_cpu_ram_efficient_loading to false.")
    if settings.machine.bits is not None:
        raise UserError("A base of 4 or 8 bits is not sharded; leave out --bits, or launch with ddp.yaml.")
    if not METHODS[settings.method].shardable:
        raise UserError(f"{settings.method} was not tried with FSDP; launch with recipes/accelerate/ddp.yaml.")


def require_rows(settings: Settings, rows: int) -> None:
    """Refuse a batch over all processes that is larger than the training set: rows would be repeated to fill it.

    Raises:
        UserError: there are fewer rows.
    """
    number, batch = processes.world_size(), settings.optimisation.batch_size
    together = batch * number
    if number > 1 and rows < together:
        raise UserError(
            f"{number} processes with a batch size of {batch} take {together} rows at a time, "
            f"but there are {rows}; lower --batch-size or the number of processes."
        )


def fit_checkpoint(checkpoint: Path, *, dropout: bool) -> None:
    """Let a checkpoint be resumed by another number of processes than wrote it.

    Trainer looks for a state of the random numbers by the process's number, and goes on with whatever they are if there
    is none. All processes went through the same stream (`scalabl.training.rank_noise`), so that any one's will do. With
    dropout they did not: then other masks are drawn after resuming.

    Args:
        checkpoint: a directory of Trainer's; called in one process.
        dropout: whether dropout masks are drawn.

    Raises:
        UserError: it was written by FSDP and this is not, or the other way round.
    """
    sharded = (checkpoint / "pytorch_model_fsdp.bin").exists() or (checkpoint / "pytorch_model_fsdp_0").is_dir()
    if sharded != processes.is_sharded():
        was, now = ("FSDP", "without it") if sharded else ("no FSDP", "with it")
        raise UserError(f"{checkpoint} was written under {was} and cannot be resumed {now}; launch as before.")
    if dropout:
        return
    present = sorted(checkpoint.glob("rng_state*.pth"))
    names = (
        ["rng_state.pth"]
        if processes.world_size() == 1
        else [f"rng_state_{i}.pth" for i in range(processes.world_size())]
    )
    for name in names:
        if present and not (checkpoint / name).exists():
            shutil.copyfile(present[0], checkpoint / name)
