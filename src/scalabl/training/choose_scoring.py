"""Which scoring a run uses: the one whose untrained NLL on validation rows is lowest, chosen before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.class_balance import class_weights
from scalabl.data.example import Example, Task
from scalabl.data.template import template_of_prompts
from scalabl.data.text_rows import TextRow, TextTask
from scalabl.metrics.uncertainty import negative_log_likelihood
from scalabl.predictive.base import predict
from scalabl.runs.models import is_encoder
from scalabl.runs.settings import FIELDS, Settings
from scalabl.scoring.base import Batch, Scoring
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.conversation import require_template
from scalabl.scoring.head import Head
from scalabl.scoring.letters import Letters
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.text import Text
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk

MOST_LETTERS = 26  # labels, over which a head tells them apart better than one token each


def check_rows(settings: Settings, task: Task | TextTask) -> None:
    """Refuse settings that are of the other kind of rows.

    Raises:
        UserError: a scoring for rows of text, or a normalisation of the KL for questions with choices.
    """
    if isinstance(task, TextTask):
        for name in ("scoring", "normalization", "template"):
            if getattr(settings.rows, name) != FIELDS[name].default:
                raise UserError(
                    f"{name} is {getattr(settings.rows, name)}, which is of questions with choices, but "
                    f"{settings.data} has rows of text; leave it out."
                )
    elif settings.posterior.kl_normalization != "token":
        raise UserError(
            f"kl_normalization is {settings.posterior.kl_normalization}, which is of rows of text, but {settings.data} "
            "has questions with choices; leave it out."
        )


def takes_head(settings: Settings, task: Task | TextTask, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a run trains a classification head: it was chosen, the model is an encoder, rows are pairs of texts, or
    label words are no single tokens or too many to be told apart by one, or a row may have several.

    Raises:
        UserError: rows that a head cannot have, or a scoring that an encoder cannot have.
    """
    scoring, labels = settings.rows.scoring, task.labels
    if has_several(task) and scoring not in ("auto", "head"):
        raise UserError(
            f'The rows of {settings.data} have several "labels" each, which only a classification head learns; leave '
            "out --scoring."
        )
    encoder = is_encoder(settings.model)
    if not encoder and scoring != "head":
        rows = settings.rows
        plain = scoring == "auto" and rows.normalization == "auto" and not rows.chat and rows.template is None
        if has_several(task):
            return True  # what is not plain is refused by the head
        pairs = any(getattr(each[0], "pair", None) is not None for each in task.splits.values())
        return plain and labels is not None and (pairs or not _single_tokens(labels, tokenizer))
    if labels is None:
        what = f"{settings.model} is an encoder" if encoder else "scoring is head"
        raise UserError(
            f'{what}, whose classification head needs rows {{"text", "label"}}, but those of {settings.data} are of '
            "another kind; give such rows" + (", or a language model." if encoder else " or another scoring.")
        )
    if scoring not in ("auto", "head"):
        raise UserError(f"{settings.model} is an encoder, which has no {scoring}; leave out --scoring.")
    return True


def has_several(task: Task | TextTask) -> bool:
    """Whether a row of the task may have several labels, or none."""
    return any(getattr(rows[0], "answers", None) is not None for rows in task.splits.values())


def _single_tokens(labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> bool:
    if len(labels) > MOST_LETTERS:
        return False
    try:
        Letters(tokenizer, labels=labels)
    except UserError:
        return False
    return True


def candidates(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Any],
    labels: tuple[str, ...] | None,
    *,
    head: bool = False,
    counts: dict[str, int] | None = None,
) -> list[Scoring]:
    """The scorings that the settings allow for these rows, `Example`s or `TextRow`s.

    Args:
        settings: of the run.
        tokenizer: the base model's.
        rows: all that the run reads.
        labels: the class words that they share, if they do.
        head: whether a classification head is trained.
        counts: how many training rows each label has, for class weights.

    Raises:
        UserError: letters were chosen, but a label is not one token; class weights that there are not, or without a
            head.
    """
    weights = settings.optimisation.class_weights
    if weights is not None and not head:
        raise UserError(f"class_weights is {weights}, which is of a classification head; leave it out.")
    if isinstance(rows[0], TextRow):
        of_messages = not isinstance(rows[0].prompt, str)  # then a prompt of its own is a turn too
        if of_messages:
            require_template(tokenizer, f"Row {rows[0].id}")
        return [Text(tokenizer, chat=settings.rows.chat or of_messages, max_length=settings.rows.max_length)]
    if head:
        assert labels is not None
        if settings.rows.template is not None:
            raise UserError(
                f"template is {settings.rows.template!r}, but a classification head reads a text as it is, without a "
                "prompt; leave it out, or take --scoring letters or continuation."
            )
        of_labels = None if weights is None or counts is None else class_weights(weights, counts)
        pairs, longest = rows[0].pair is not None, settings.rows.max_length
        several = rows[0].answers is not None
        common_head: dict[str, Any] = {"chat": settings.rows.chat, "max_length": longest, "pairs": pairs}
        return [Head(tokenizer, labels=labels, class_weights=of_labels, several=several, **common_head)]
    template = settings.rows.template
    if template is None and rows[0].rendered:
        template = template_of_prompts(rows)
    common: dict[str, Any] = {
        "chat": settings.rows.chat, "max_length": settings.rows.max_length, "template": template,
    }  # fmt: skip
    found: list[Scoring] = []
    if settings.rows.scoring in ("auto", "letters"):
        try:
            found.append(Letters(tokenizer, labels=labels, num_letters=max(len(r.choices) for r in rows), **common))
        except UserError:
            if settings.rows.scoring == "letters":
                raise
    if settings.rows.scoring in ("auto", "continuation"):
        kinds = ("sum", "token") if settings.rows.normalization == "auto" else (settings.rows.normalization,)
        for kind in kinds:
            found.append(Continuation(tokenizer, normalization=kind, task_labels=labels is not None, **common))  # type: ignore[arg-type]
    return found


def choose_scoring(
    options: Sequence[Scoring], model: PeftModel, trunk: Trunk | None, validation: Sequence[Example]
) -> tuple[Scoring, dict[str, float]]:
    """The option with the lowest validation NLL under the untrained model, and every option's NLL by its name.

    Args:
        options: the scorings to choose from.
        model: with a fresh adapter, whose output is the base model's (B = 0).
        trunk: its frozen layers, or None.
        validation: held-out rows.

    Raises:
        UserError: the model gives no numbers.
    """
    if len(options) == 1 or not validation:
        return options[-1], {}
    labels = torch.tensor([row.answer for row in validation])
    nll: dict[str, float] = {}
    for _, group in groupby(options, key=_encoding):
        alike = list(group)
        scorer = Scorer(model, alike[0], trunk)
        rows = with_stored_trunk(scorer, [alike[0].encode(row) for row in validation], description=alike[0].name)
        log_probs = predict(scorer, rows, _EveryScoring(alike))
        for option, of_option in zip(alike, log_probs, strict=True):
            nll[describe(option)] = float(negative_log_likelihood(of_option[None], labels))
    if not all(map(math.isfinite, nll.values())):
        raise UserError(
            "The base model's log-probabilities are NaN or infinite; check its weights, its dtype and --lora-alpha."
        )
    best = min(options, key=lambda option: nll[describe(option)])
    return best, nll


class _EveryScoring:
    """One pass for scorings of the same tokens: (number of scorings, B, C) instead of particles."""

    name = "scorings"

    def __init__(self, scorings: Sequence[Scoring]) -> None:
        self.scorings = scorings

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        logits = scorer.logits(batch)
        return torch.stack([scoring.class_logits(logits, batch).log_softmax(dim=-1) for scoring in self.scorings])


def _encoding(scoring: Scoring) -> dict[str, Any]:
    """The settings that decide a row's tokens: sums and means per token are of the same ones."""
    return {name: value for name, value in scoring.settings().items() if name != "normalization"}


def describe(scoring: Scoring) -> str:
    """A scoring in words: "letters", "continuation (per token)"."""
    if isinstance(scoring, Continuation):
        return f"continuation ({'per token' if scoring.normalization == 'token' else 'sums'})"
    return scoring.name
