"""What a classifier is made of: an adapter's directory with its record or without, or a model that is in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.predictive.auto import make_predictive
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.lora_particles import DropoutPredictive, blob_draws
from scalabl.runs.directory import find_base, reading_config
from scalabl.runs.loading import longest_row
from scalabl.runs.models import load_base, require_vocabulary, saved_tokenizer
from scalabl.runs.record import HEAD, SEVERAL_LABELS, RunRecord
from scalabl.runs.stock import LONGEST, UNNAMED, find_record, is_stock
from scalabl.scoring.base import Encoded, Scoring
from scalabl.scoring.head import Head
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.blob import BLoBProjection
from scalabl.tuner.layers import sequence_classifier
from scalabl.tuner.projection import StochasticProjection
from scalabl.tuner.threads import base_model


@dataclass
class BareRun:
    """What a `Predictor` needs of a run, for an adapter without a record of its training.

    Attributes:
        scorer: the model with its scoring.
        dropout: of a plain LoRA whose masks are averaged; 0 leaves it off.
    """

    scorer: Scorer
    dropout: float = 0.0

    @property
    def is_bayesian(self) -> bool:
        """Whether the adapter has a posterior over s."""
        return self._has(StochasticProjection)

    def _has(self, kind: type) -> bool:
        return any(isinstance(module, kind) for module in self.scorer.model.modules())

    def predictive(
        self, name: str | None = None, *, samples: int = 10, seed: int = 0, stochastic_layers: str | None = None
    ) -> Predictive:
        """As `Run.predictive`, by what the model is made of.

        Raises:
            UserError: a predictive or a dropout that the adapter does not have.
        """
        bayesian = self.is_bayesian or self._has(BLoBProjection)
        if self.dropout and bayesian:
            raise UserError("dropout is of a plain LoRA, but this adapter has a posterior; leave it out.")
        if name == "mc" and not bayesian and not self.dropout:
            raise UserError("This adapter is a plain LoRA with no posterior; leave out predictive, or take mean.")
        if name == "mean" or self.is_bayesian:
            return make_predictive(name or "mc", samples=samples, seed=seed)
        if self._has(BLoBProjection):
            return blob_draws(self.scorer.model, samples=samples, seed=seed)
        return DropoutPredictive(self.dropout, samples=samples, seed=seed) if self.dropout else MeanPredictive()

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """Rows as tokens."""
        return [self.scorer.scoring.encode(row) for row in rows]


def refuse_unread(scoring: Mapping[str, Any], **given: Any) -> None:
    """Refuse settings of prompts where a run's own scoring decides; None, and what the run has too, is left.

    Raises:
        UserError: the first that differs.
    """
    for name, value in given.items():
        if value is not None and value != scoring.get(name):
            raise UserError(f"{name} is the run's own where rows are scored as it was trained; leave it out.")


def shared_labels(scoring: Scoring, known: Sequence[str] | None) -> tuple[str, ...] | None:
    """The labels that all rows of a scoring share; None for questions with choices of their own.

    Args:
        scoring: which names them itself, but for a continuation.
        known: those of the run's record.
    """
    named = getattr(scoring, "labels", None) or (known if getattr(scoring, "shared", False) else None)
    return None if named is None else tuple(named)


def letters_of(
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    chat: bool | None,
    max_length: int | None,
) -> Letters:
    """The scoring of label words; without a template texts given to it are taken for prompts (`rows_of`)."""
    longest = LONGEST if max_length is None else max_length
    return Letters(tokenizer, labels=tuple(labels), template=template, chat=bool(chat), max_length=longest)


def head_over(
    labels: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None,
    chat: bool | None,
    max_length: int | None,
) -> Head:
    """The scoring of a head over these labels, in the order of its outputs; of 512 tokens where nothing else is said.

    Raises:
        UserError: a template, which no head has.
    """
    if template is not None:
        raise UserError("A classification head reads the text as it is; leave out template.")
    return Head(tokenizer, labels=labels, chat=bool(chat), pairs=None, max_length=max_length or 512)


def head_of(model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Head:
    """The scoring of a model's own classification head, its labels in the order of the head's outputs.

    Raises:
        UserError: the model has none, or a decoder's head would look behind another token than the tokenizer pads with.
    """
    base = sequence_classifier(model)
    if base is None:
        kind = type(base_model(model)).__name__
        raise UserError(f"A {kind} has no classification head; give a scoring, Letters(tokenizer, labels=[...]).")
    if base.config.problem_type == "regression":
        raise UserError("This head is of a regression, whose outputs are no labels.")
    pad = base.config.get_text_config().pad_token_id
    if hasattr(base, "score") and (pad is None or pad != tokenizer.pad_token_id):
        raise UserError(
            f"The model's head looks behind its pad token {pad}, but the tokenizer pads with {tokenizer.pad_token_id}; "
            "set model.config.pad_token_id to tokenizer.pad_token_id."
        )
    several = base.config.problem_type == SEVERAL_LABELS
    return Head(tokenizer, labels=_named(base), max_length=longest_row(base), pairs=None, several=several)


def _named(model: PreTrainedModel) -> list[str]:
    """The labels of a model's configuration, in the order of the head's outputs."""
    names: Any = model.config.id2label
    return [names[i] for i in range(len(names))]


def record_of(
    directory: Path, *, labels: Sequence[str] | None, max_length: int | None, model: PreTrainedModel | str | None
) -> RunRecord | None:
    """The record of a run, or what the files of an adapter with a head say; None of another adapter without one.

    Args:
        directory: the adapter's.
        labels: of a head, in the order of its outputs, where no file says them and a loaded model does not.
        max_length: of a head's rows, where no record says it.
        model: the base model or where it is, if the adapter does not name it.

    Raises:
        UserError: as `scalabl.runs.stock.find_record`.
    """
    several = isinstance(model, PreTrainedModel) and model.config.problem_type == SEVERAL_LABELS
    if isinstance(model, PreTrainedModel):
        own = _named(model)
        named = sequence_classifier(model) is not None and not all(map(UNNAMED.fullmatch, own))
        labels = own if named and labels is None else labels
        model = model.name_or_path or type(model).__name__
    record = find_record(directory, labels=labels, model=model)
    if record is None or not is_stock(record):
        return record
    known = {"max_length": max_length, "several": several or None}
    return replace(record, scoring=record.scoring | {name: v for name, v in known.items() if v is not None})


def base_of(
    adapter: Path,
    record: RunRecord | None,
    model: PreTrainedModel | str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of an adapter and the tokenizer: the given one, the one saved beside the adapter, its own."""
    if isinstance(model, nn.Module):
        if not isinstance(model, PreTrainedModel):
            raise UserError(
                f"model is a {type(model).__name__}; give the base model without an adapter, or where it is."
            )
        tokenizer = tokenizer or saved_tokenizer(adapter)
        if tokenizer is None:
            raise UserError("A loaded model needs its tokenizer beside it; pass tokenizer=...")
        base = model
        if record is not None and record.scoring["scoring"] == HEAD:
            number = getattr(sequence_classifier(base), "num_labels", 0)
            if number != len(record.scoring["labels"]):
                raise UserError(
                    f"The adapter has a classification head of {len(record.scoring['labels'])} labels, but the model "
                    f"{f'one of {number}' if number else 'none'}; load it with AutoModelForSequenceClassification and "
                    "num_labels."
                )
    else:
        with reading_config(adapter):
            named = record.model if record else PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        if model is None and not named:
            raise UserError(f"{adapter} does not name its base model; pass model=...")
        options = record.base_options if record else {}
        place = str(model) if model is not None else find_base(str(named), adapter)
        base, tokenizer = load_base(place, **options, tokenizer=tokenizer, adapter=adapter)
    require_vocabulary(tokenizer, base, "The tokenizer")
    return base, tokenizer
