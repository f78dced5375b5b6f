"""Trainings in which the KL's gradient would be lost or wrong without a word, or whose optimiser cannot run here:
refused by name before the first step.

8-bit states (bitsandbytes, torchao) are kept for tensors of 4,096 numbers and more: those of A and B. The r numbers of
a layer are fewer, so that their states are float32 under every optimiser.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.optim import Optimizer
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from scalabl.core.errors import UserError, one_line
from scalabl.training.parameter_group import innermost


def refuse_hidden_gradients(args: TrainingArguments, model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse engines that do not leave whole gradients in `.grad` until `optimizer.step()`.

    Raises:
        UserError: DeepSpeed, the first FSDP, checkpointing that redraws the noise, or an optimiser that updates during
            the backward pass.
    """
    if args.deepspeed or getattr(args, "deepspeed_plugin", None) or isinstance(optimizer, DeepSpeedOptimizerWrapper):
        raise UserError(
            "DeepSpeed keeps gradients to itself, so the KL's gradient cannot be added to them; train with DDP or with "
            "FSDP 2 (fsdp_config: version 2) instead."
        )
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError(
            "The first version of FSDP flattens the variational parameters into others, so the KL's gradient cannot be "
            "added to them; set version 2 in fsdp_config."
        )
    recomputed = [getattr(getattr(module, "checkpoint_fn", None), "keywords", {}) for module in model.modules()]
    if any(options.get("preserve_rng_state") is False for options in [*recomputed, _checkpointing(args)]):
        raise UserError(
            "Checkpointing with preserve_rng_state=False, as FSDP's is, draws other noise in the backward pass than "
            "in the forward pass; set fsdp_activation_checkpointing to false, gradient_checkpointing=True will do."
        )
    in_backward = str(getattr(args.optim, "value", args.optim))
    names = {type(optimizer).__name__, type(innermost(optimizer)).__name__}
    if in_backward.endswith("_layerwise") or names & {"LayerWiseDummyOptimizer", "Lomo", "AdaLomo"}:
        raise UserError(
            f"The optimiser {in_backward} updates during the backward pass, before the KL's gradient could be added; "
            "choose another one in TrainingArguments.optim, for instance adamw_torch."
        )


def _checkpointing(args: TrainingArguments) -> dict[str, Any]:
    """How a trainer recomputes activations; empty where it does not, or says nothing about it."""
    options: Any = args.gradient_checkpointing_kwargs
    return options if args.gradient_checkpointing and isinstance(options, dict) else {}


def refuse_flattened_batches(args: TrainingArguments, train_dataloader: Any) -> None:
    """Refuse batches in which sequences are laid end to end: a draw of s belongs to a row.

    Raises:
        UserError: TRL's packing or padding_free, or a flattening collator.
    """
    for option in ("packing", "padding_free"):
        if getattr(args, option, False) is True:
            raise UserError(
                f"{option}=True lays several sequences into one row, but every sequence needs its own draw of s; set "
                f"{option}=False."
            )
    collator = getattr(train_dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)  # Trainer wraps it to drop unused columns
    if isinstance(collator, DataCollatorWithFlattening) or getattr(collator, "padding_free", False) is True:
        raise UserError(
            f"{type(collator).__name__} lays several sequences into one row, but every sequence needs its own draw of "
            "s; use a collator that pads."
        )


def refuse_untrained(optimizer: Optimizer, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse variational parameters that no optimiser would move.

    Args:
        optimizer: the trainer's optimiser.
        parameters: the trainable variational parameters with the names of their layers.

    Raises:
        UserError: there is none (all frozen), or one of them is not in the optimiser.
    """
    named = list(parameters)
    if not named:
        raise UserError(
            "All variational parameters are frozen: load the adapter with is_trainable=True, or leave out ELBOCallback."
        )
    known = {id(parameter) for group in innermost(optimizer).param_groups for parameter in group["params"]}
    for name, parameter in named:
        if id(parameter) not in known:
            raise UserError(
                f"The posterior of {name} is not among the optimiser's parameters, so it would never be trained; build "
                "the optimiser from model.parameters() after the adapter was made."
            )


# by the name of the settings that TRL's trainers take; the settings of others (GMPO) are made of these
_COMPARE_DRAWS = {
    "GRPOConfig", "RLOOConfig", "AsyncGRPOConfig", "A2POConfig", "SDPOConfig", "SDFTConfig", "IWOPDConfig",
    "PPOConfig", "OnlineDPOConfig", "XPOConfig", "NashMDConfig",
}  # fmt: skip


def refuse_ratios_of_draws(args: TrainingArguments) -> None:
    """Refuse trainers that generate a text and then hold its probability against that of another pass.

    A draw of s belongs to one pass: the ratio of a text's probabilities in two passes moves with the noise alone, and
    a text generated in training mode has another s for every token.

    Raises:
        UserError: TRL's GRPO, RLOO, PPO, online DPO and what is made of them.
    """
    names = [kind.__name__ for kind in type(args).__mro__ if kind.__name__ in _COMPARE_DRAWS]
    if names:
        raise UserError(
            f"{names[0].removesuffix('Config')} holds the probability of a generated text against another pass, whose "
            "draw of s is another one, so that its ratios would be noise; train with SFT, DPO or KTO, or without a "
            "posterior."
        )


def refuse_drawn_reference(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse a reference that TRL would read before training begins, in a model whose adapters draw.

    Raises:
        UserError: `precompute_ref_log_probs` with a model in training mode.
    """
    if getattr(args, "precompute_ref_log_probs", False) is True and model.training:
        raise UserError(
            "precompute_ref_log_probs=True reads the reference before training, and a model in training mode draws "
            "noise; call model.eval() before the trainer is made."
        )


# they ask for a list of modules of their own, or update during the backward pass, before the KL's gradient is added
_UNFIT = ("galore", "apollo", "lomo", "adalomo")
_SIDE = 64  # 64 x 64 numbers: the fewest of which a state is 8 bit


def require_known(name: str) -> None:
    """Refuse an optimiser that the Trainer does not have.

    Raises:
        UserError: there is none of this name.
    """
    if name not in list(OptimizerNames):
        raise UserError(f"optimizer is {name!r}; it must be one of {', '.join(OptimizerNames)}.")


def require_optimizer(name: str, device: str) -> None:
    """Refuse an optimiser that cannot take a step on this device.

    Args:
        name: as in `TrainingArguments.optim`.
        device: "cpu" or an accelerator.

    Raises:
        UserError: there is no such optimiser, its package is not installed, it cannot run here, or the KL's gradient
            cannot be added to its updates.
    """
    require_known(name)
    if name.split("_")[0] in _UNFIT:
        raise UserError(
            f"The optimiser {name} projects or applies gradients in the backward pass, before the KL's is added to "
            "them; choose another one, for instance adamw_torch or paged_adamw_8bit."
        )
    try:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # paged memory that a CPU has not
            _step(name, device, scratch)
    except Exception as error:  # whatever the library raises
        why = one_line(error)
        raise UserError(
            f"The optimiser {name} cannot take a step on this machine ({device}): {why[:200].rstrip('.')}; choose "
            "another one, for instance adamw_torch."
        ) from error


def _step(name: str, device: str, scratch: str) -> None:
    arguments = TrainingArguments(output_dir=scratch, optim=name, use_cpu=device == "cpu", report_to=[])
    # no random numbers: the run's own are not touched
    weight = nn.Parameter(torch.ones(_SIDE, _SIDE, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, nn.ParameterList([weight]))  # type: ignore[arg-type]
    kind([weight], **options).step()
    if (weight == 1).all() or not weight.isfinite().all():
        raise ValueError("its step moves nothing, or to NaN")
