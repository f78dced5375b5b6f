"""`scalabl train` in several processes: what the launcher set up is checked before any work, checkpoints are moved
between numbers of processes, and the ranks' noise is one process's, each rank taking its rows, or a stream of its own
for each.

Trainer seeds all ranks alike. Left at that, rank 0's first row and rank 1's would get the same draw of s.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.utils import compare_versions
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.core.files import write_json
from scalabl.runs.registry import METHODS
from scalabl.runs.settings import Settings
from scalabl.training.checkpoints import note_digest
from scalabl.tuner.layers import decoder_layers, unwrap
from scalabl.tuner.projection import StochasticProjection

# a prime far apart from the small seeds that people give: the streams of two ranks and two runs never meet
_SEEDS_BETWEEN_RANKS = 1_000_003
# older Accelerate gives whole tensors to PEFT, and where parameters are shards (FSDP 2) nothing is loaded
_READS_SHARDS_BACK = "1.15"


def check_launch(settings: Settings) -> None:
    """Refuse what `accelerate launch` set up where a run with these settings would fail or be another one.

    Raises:
        UserError: DeepSpeed is not installed or would hide the KL's gradient; an FSDP setting that this package does
            not train with, or an Accelerate that would not go on.
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
    if compare_versions("accelerate", "<", _READS_SHARDS_BACK):
        raise UserError(
            f"A sharded run would go on without what it had learned: Accelerate {accelerate.__version__} does not read "
            f'shards of an adapter back; pip install "accelerate>={_READS_SHARDS_BACK}", or launch with '
            "recipes/accelerate/ddp.yaml."
        )


def shard_by_layers(plugin: Any, model: nn.Module) -> None:
    """Let FSDP 2 gather a model layer by layer, where the launcher names no classes of its own.

    Transformers counts an encoder's embeddings among its blocks, or names no blocks. Accelerate shards input embeddings
    by themselves, and torch refuses to shard a weight twice.

    Args:
        plugin: Accelerate's settings of FSDP, before the model is sharded.
        model: to be sharded.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        base: Any = unwrap(model)
        blocks = {type(layer).__name__ for layer in decoder_layers(model)} | set(base._no_split_modules or ())
        inputs = base.get_input_embeddings()
        holding = {type(m).__name__ for m in model.modules() if any(part is inputs for part in m.modules())}
        plugin.transformer_cls_names_to_wrap = sorted(blocks - holding)


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


def fit_checkpoint(checkpoint: Path, *, dropout: bool, batch_size: int) -> None:
    """Let a checkpoint be resumed by another number of processes than wrote it.

    Trainer looks for a state of the random numbers by the process's number, and goes on with whatever they are if there
    is none. All processes went through the same stream (`share_noise`), so that any one's will do. With
    dropout they did not: then other masks are drawn after resuming. Older Transformers goes on with the batch size in
    the checkpoint, which is that of a process.

    Args:
        checkpoint: a directory of Trainer's; called in one process.
        dropout: whether dropout masks are drawn.
        batch_size: of each process now.

    Raises:
        UserError: it was written by FSDP and this is not, or the other way round.
    """
    sharded = (checkpoint / "pytorch_model_fsdp.bin").exists() or (checkpoint / "pytorch_model_fsdp_0").is_dir()
    if sharded != processes.is_sharded():
        was, now = ("FSDP", "without it") if sharded else ("no FSDP", "with it")
        raise UserError(f"{checkpoint} was written under {was} and cannot be resumed {now}; launch as before.")
    written = checkpoint / TRAINER_STATE_NAME
    state = json.loads(written.read_text(encoding="utf-8"))
    if state["train_batch_size"] != batch_size:
        write_json(written, state | {"train_batch_size": batch_size})
        note_digest(written)
    if dropout:
        return
    present = sorted(checkpoint.glob("rng_state*.pth"))
    number = processes.world_size()
    names = ["rng_state.pth"] if number == 1 else [f"rng_state_{i}.pth" for i in range(number)]
    for name in names:
        if present and not (checkpoint / name).exists():
            shutil.copyfile(present[0], checkpoint / name)


def share_noise(args: TrainingArguments, model: nn.Module, leaves: Iterable[StochasticProjection]) -> None:
    """Let the draws of s be those of one process, however many ranks there are.

    All ranks go through the same stream of random numbers: each layer draws the noise of the whole batch, the rows of
    all ranks behind each other, and a rank keeps its own rows. That is what one process draws for that batch. Ranks
    that share a sequence (tensor or context parallel) keep sharing its draw.

    It takes that nothing but s is random: dropout masks are drawn by a rank for its own rows, after which the streams
    would no longer be the same. With dropout every rank has a stream of its own instead: other draws than one
    process's, of the same distribution.

    Args:
        args: the trainer's.
        model: what is trained.
        leaves: its stochastic layers.
    """
    rank, ranks = _replica(args)
    shared = ranks > 1 and not has_dropout(model)
    for leaf in leaves:
        leaf.share = (rank, ranks) if shared else (0, 1)
    if not shared:
        separate_noise(args)


def separate_noise(args: TrainingArguments) -> None:
    """A noise stream of its own for every data-parallel rank; ranks that share a sequence keep sharing its draw."""
    rank, ranks = _replica(args)
    if ranks > 1:
        torch.manual_seed(args.seed + _SEEDS_BETWEEN_RANKS * rank)


class SeparateNoise(TrainerCallback):
    """For methods whose noise is not s (dropout, a baseline's own): a stream of its own for every rank."""

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        separate_noise(args)


def has_dropout(model: nn.Module) -> bool:
    """Whether a training pass draws dropout masks, in a module or by the model's configuration."""
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    names = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout")
    return any(isinstance(values.get(name), float) and values[name] > 0 for name in names)


def _replica(args: TrainingArguments) -> tuple[int, int]:
    """(number of this data-parallel replica, how many there are)."""
    ranks_of_a_replica = getattr(args.parallelism_config, "non_data_parallel_size", 1)
    return args.process_index // ranks_of_a_replica, args.world_size // ranks_of_a_replica
