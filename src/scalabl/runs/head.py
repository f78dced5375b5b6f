"""A classification head on a base model: what it is loaded with, that it is the trained one, and that it is float32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from scalabl.core.errors import UserError
from scalabl.core.modules import base_name
from scalabl.core.remote_code import trust_remote_code
from scalabl.runs.directory import saved_shapes
from scalabl.runs.record import SEVERAL_LABELS
from scalabl.tuner.layers import head_parts


def head_options(
    config: Any,
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    adapter: Path | None,
    several: bool = False,
) -> dict[str, Any]:
    """What a classification head over these labels is loaded with: its size, its names, the token that a decoder's head
    looks behind, and whether a pipeline takes sigmoids of its outputs. An adapter's own head may be of another size
    than the base's.

    Args:
        config: the base model's.
        labels: in the order of the head's outputs.
        tokenizer: which the rows are padded with.
        adapter: the adapter's directory, where there is one.
        several: whether a row may have several of the labels.

    Raises:
        UserError: the model has no form with a head, or has one of another size.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{config.model_type} has no form with a classification head in Transformers; use --scoring letters or "
            "continuation."
        )
    own = [name for name in config.architectures or () if name.endswith("ForSequenceClassification")]
    if own and adapter is None and config.num_labels != len(labels):
        raise UserError(
            f"The model has a classification head of {config.num_labels} labels, but the rows have {len(labels)}; give "
            "the model that it was made of, or rows with its labels."
        )
    names = dict(enumerate(labels))
    return {
        "num_labels": len(labels),
        "id2label": names,
        "label2id": {label: i for i, label in names.items()},
        "pad_token_id": tokenizer.pad_token_id,
        "ignore_mismatched_sizes": adapter is not None,
        **({"problem_type": SEVERAL_LABELS} if several else {}),
    }


def require_trained(loaded: dict[str, Any], adapter: Path, name: str) -> None:
    """Refuse weights that a base was given at random and that the adapter does not have either.

    Raises:
        UserError: there are some, as where a pooler was trained, but not saved.
    """
    drawn = [*loaded["missing_keys"], *(each[0] for each in loaded["mismatched_keys"])]
    saved = {base_name(name) for name in saved_shapes(adapter)}
    lost = sorted({key.rpartition(".")[0] for key in drawn if key not in saved})
    if lost:
        raise UserError(
            f"Neither the adapter in {adapter} nor the model {name} has the weights of {', '.join(lost)}, so that "
            "answers would be at random; train it with these in modules_to_save, or give the model that has them."
        )


def head_names(config: Any) -> list[str]:
    """The modules of a model's classification head, which a quantised base leaves whole."""
    with torch.device("meta"):
        return list(
            head_parts(AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code()))
        )


def keep_whole(model: nn.Module) -> None:
    """Bring a classification head to float32, what it is given too, whatever holds the base: its logits are float32."""
    for module in head_parts(model).values():
        if any(p.dtype != torch.float32 for p in module.parameters()):
            module.float().register_forward_pre_hook(_in_float32)


def _in_float32(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
