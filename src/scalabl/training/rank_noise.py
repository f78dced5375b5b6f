"""The noise of several data-parallel ranks: one process's, each rank taking its rows; or a stream of its own for each.

Trainer seeds all ranks alike. Left at that, rank 0's first row and rank 1's would get the same draw of s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalabl.tuner.projection import StochasticProjection

# a prime far apart from the small seeds that people give: the streams of two ranks and two runs never meet
_SEEDS_BETWEEN_RANKS = 1_000_003


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
    """For methods whose noise is not s (dropout, a rival's own): a stream of its own for every rank."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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
