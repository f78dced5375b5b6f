"""A finished run as something that predicts: base model, adapter, scoring and trunk."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalabl.core import processes
from scalabl.core.errors import UserError, one_line
from scalabl.runs.directory import find_base, reading_config
from scalabl.runs.method import Run
from scalabl.runs.models import load_base
from scalabl.runs.record import CHOICES, HEAD, LANGUAGE, RECORD, RunRecord
from scalabl.runs.settings import DEFAULTS
from scalabl.runs.stock import METHOD_OF, Asked, is_stock, read_classifier, read_generating
from scalabl.scoring.base import Scoring
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import Scorer, make_scoring
from scalabl.scoring.text import Text
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


def asked_scoring(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Scoring:
    """The scoring of an adapter without a record: label words by the token of each where they are one, else by their
    log-likelihood; choices of their own by that per token.

    Args:
        settings: what was asked (`scalabl.runs.stock.Asked`); "scoring" may be "auto".
        tokenizer: the adapter's.

    Raises:
        UserError: letters were asked for, but a label is not one token; no chat template; another's template.
    """
    common = {name: settings[name] for name in ("template", "chat", "max_length")}
    labels, kind = settings["labels"], settings["scoring"]
    if kind == "letters" or (kind == "auto" and labels is not None):
        try:
            return Letters(tokenizer, labels=labels, num_letters=26, **common)
        except UserError:
            if kind == "letters":
                raise
    return Continuation(
        tokenizer, normalization="token" if labels is None else "sum", task_labels=labels is not None, **common
    )


def longest_row(model: nn.Module) -> int:
    """How many tokens a row of a classification head has at most: 512, or the model's learnt positions."""
    return min(_LONGEST, learnt_positions(model) or _LONGEST)


def run_in_memory(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Run:
    """A language model that is in memory, with its active adapter or without one, as a run that writes text.

    Raises:
        UserError: it has a classification head, or an adapter of a kind that is not known here.
    """
    config = model.peft_config[model.active_adapter] if isinstance(model, PeftModel) else None
    kind = "LORA" if config is None else str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in METHOD_OF:
        raise UserError(f"The model has an adapter of type {kind}; give one with a ScalaBL adapter or a plain LoRA.")
    record = RunRecord(recipe={**DEFAULTS, "method": METHOD_OF[kind], "steps": 0}, status="finished", kind=LANGUAGE)
    return Run(record, Scorer(model, Text(tokenizer), Trunk(model)), tokenizer)


def load_run(directory: Path, *, model: str | None = None, generating: bool = False, asked: Asked | None = None) -> Run:
    """Load a finished run.

    Args:
        directory: made by `scalabl train`, or an adapter that another trainer saved.
        model: the base model, if it has moved since.
        generating: for its texts rather than for choices: one that was trained on rows of text will do too.
        asked: how the rows of an adapter without a record are scored; None refuses a language model's.

    Raises:
        UserError: not a finished run, altered files, another base model.
    """
    if generating:
        record = read_generating(directory, model=model)
    else:
        record = read_classifier(directory, model=model, asked=asked)
    adapted, tokenizer = load_adapted(directory, record, model)
    if is_stock(record) and record.kind == CHOICES and record.scoring["scoring"] != HEAD:
        scoring = asked_scoring(record.scoring, tokenizer)
        record = replace(record, scoring=scoring.settings(), scoring_name=scoring.name)
    else:
        scoring = scoring_of(record, adapted, tokenizer)
    return Run(record, Scorer(adapted, scoring, Trunk(adapted)), tokenizer, directory)
