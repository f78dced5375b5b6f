"""Which optimisers of the Trainer can train a run here: found out by a step of one, before any long work.

8-bit states (bitsandbytes, torchao) are kept for tensors of 4,096 numbers and more: those of A and B. The r numbers of
a layer are fewer, so that their states are float32 under every optimiser.
"""

from __future__ import annotations

import tempfile
import warnings

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from scalabl.errors import UserError, one_line

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
