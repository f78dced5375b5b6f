"""A finished run as something that predicts: base model, adapter, scoring and trunk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from scalabl.core import processes
from scalabl.core.errors import UserError, one_line
from scalabl.runs.directory import find_base, reading_config
from scalabl.runs.method import Run
from scalabl.runs.models import load_base
from scalabl.runs.record import HEAD, RECORD, RunRecord
from scalabl.runs.stock import read_classifier
from scalabl.scoring.base import Scoring
from scalabl.scoring.scorer import Scorer, make_scoring
from scalabl.scoring.trunk import Trunk
from scalabl.tuner.joint import load_joint, set_joint
from scalabl.tuner.layers import learnt_positions
from scalabl.tuner.model import fingerprint, is_base

_LONGEST = 512  # tokens


def load_adapter(model: Any, directory: Path) -> PeftModel:
    """Put an adapter on its base model.

    Raises:
        UserError: the files are missing, truncated or made for another base model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            with reading_config(directory):
                adapted = PeftModel.from_pretrained(model, str(directory)).eval()
        set_joint(adapted, load_joint(directory))
        return adapted
    except UserWarning as error:
        missing = str(error).partition("keys while loading the checkpoint: ")[2][:200]
        raise UserError(f"The adapter in {directory} lacks weights ({missing}); restore its files.") from error
    except SafetensorError as error:
        raise UserError(f"The adapter in {directory} is truncated or altered ({error}); restore its files.") from error
    except RuntimeError as error:
        if "size mismatch" in str(error):
            raise UserError(
                f"The adapter in {directory} was made for a base model of other sizes; load the one that its "
                "adapter_config.json names, with its embeddings resized if they were."
            ) from error
        raise


def require_base(model: nn.Module, record: RunRecord) -> None:
    """Refuse a base model other than the one that a run was trained on.

    Raises:
        UserError: its fingerprint differs from the record's.
    """
    trained = record.base_fingerprint
    if trained is not None and not is_base(model, trained):
        raise UserError(
            f"This adapter was trained on another base model ({record.model}, whose fingerprint is "
            f"{trained}; this one's is {fingerprint(model)}); give that one with --model."
        )


def load_adapted(
    directory: Path, record: RunRecord, model: str | None = None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base model of a run with its adapter, held as it was trained, and the tokenizer: the one saved beside the
    adapter, if there is one, else the base model's.

    Args:
        directory: of a finished run.
        record: what its `scalabl.json` says.
        model: the base model, if it has moved since.

    Raises:
        UserError: altered files, another base model.
    """
    base, tokenizer = load_base(
        model or find_base(record.model, directory), **record.base_options, device=processes.own_device(),
        adapter=directory,
    )  # fmt: skip
    require_base(base, record)
    return load_adapter(base, directory), tokenizer


def scoring_of(record: RunRecord, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Scoring:
    """The scoring of a run; rows of a head whose record does not say their length are as long as the model reads."""
    settings = dict(record.scoring)
    if settings["scoring"] == HEAD:
        settings.setdefault("max_length", longest_row(model))
    try:
        return make_scoring(settings, tokenizer)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"{RECORD} has a scoring that is none ({one_line(error)[:200]}); train the run again or restore the file."
        ) from error


def longest_row(model: nn.Module) -> int:
    """How many tokens a row of a classification head has at most: 512, or the model's learnt positions."""
    return min(_LONGEST, learnt_positions(model) or _LONGEST)


def load_run(directory: Path, *, model: str | None = None, generating: bool = False) -> Run:
    """Load a finished run.

    Args:
        directory: made by `scalabl train`, or an adapter with a classification head whose labels its files name.
        model: the base model, if it has moved since.
        generating: for its texts rather than for choices: one that was trained on rows of text will do too.

    Raises:
        UserError: not a finished run, altered files, another base model.
    """
    record = RunRecord.read_generating(directory) if generating else read_classifier(directory, model=model)
    adapted, tokenizer = load_adapted(directory, record, model)
    scoring = scoring_of(record, adapted, tokenizer)
    return Run(record, Scorer(adapted, scoring, Trunk(adapted)), tokenizer, directory)
