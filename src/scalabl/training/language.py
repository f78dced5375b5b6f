"""Training on rows of text: what differs from questions with choices, the loss and the KL's weight.

The loss is the mean over all T = sum_i T_i trained tokens of the training set. The ELBO, divided by T, is

    1/T sum_i E_q[-sum_t log p(y_it | y_i<t, x_i, s_i)] + KL(q || p) / T                       [ScalaBL, the ELBO]

A step's share is the sum over the tokens of its n rows, divided by n T / N, the number that n of the N rows have on
average, and not by the batch's own number: so no row counts for more in a batch of short ones, and the objective of an
epoch is the same whatever the batch size, the order, and the number of accumulated batches or of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data.example import Task
from scalabl.data.text_rows import TextTask
from scalabl.runs.settings import Settings
from scalabl.scoring.base import Batch, Encoded, Scoring
from scalabl.scoring.text import EncodedText, Text, TextBatch
from scalabl.training.trainer import ChoiceTrainer


class LanguageTrainer(ChoiceTrainer):
    """Mean of -log p(token | what is before it) over the trained tokens, each row with its own draw of s."""

    batch_class = TextBatch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows: Any = self.train_dataset
        self.tokens_a_row = tokens_a_row(rows)

    def loss_of(self, class_logits: Tensor, batch: Batch) -> Tensor:
        """The loss of the rows' log-likelihoods (B, 1), which `Text` has for class logits."""
        return -class_logits.sum() / (len(batch) * self.tokens_a_row)


def check_rows(settings: Settings, task: Task | TextTask) -> None:
    """Refuse settings that are of the other kind of rows.

    Raises:
        UserError: a scoring for rows of text, or a normalisation of the KL for questions with choices.
    """
    if isinstance(task, TextTask):
        for name in ("scoring", "normalization"):
            if getattr(settings.rows, name) != "auto":
                raise UserError(
                    f"{name} is {getattr(settings.rows, name)}, which is of questions with choices, but "
                    f"{settings.data} has rows of text; leave it out."
                )
    elif settings.posterior.kl_normalization != "token":
        raise UserError(
            f"kl_normalization is {settings.posterior.kl_normalization}, which is of rows of text, but {settings.data} "
            "has questions with choices; leave it out."
        )


def trainer_of(scoring: Scoring) -> type[ChoiceTrainer]:
    """The trainer of a kind of rows."""
    return LanguageTrainer if isinstance(scoring, Text) else ChoiceTrainer


def weighing_the_kl(settings: Settings, rows: Sequence[Encoded]) -> Settings:
    """The settings that a method's callbacks are made of, for as many examples as there are rows.

    A loss that is a mean over tokens is 1/T of the rows' sum, where a method expects 1/N of it: with
    `kl_normalization="token"` its KL is multiplied by N/T, so that it weighs KL / T, which is the exact ELBO.
    "sequence" leaves it at KL / N, as if a row were one observation: T/N times the ELBO's weight.
    """
    if not isinstance(rows[0], EncodedText) or settings.posterior.kl_normalization == "sequence":
        return settings
    return settings.changed(beta=settings.posterior.beta / tokens_a_row(rows))


def tokens_a_row(rows: Sequence[Encoded]) -> float:
    """T/N: how many trained tokens a row has on average."""
    return token_counts(rows)["trained"] / len(rows)


def token_counts(rows: Sequence[Encoded]) -> dict[str, int]:
    """How many tokens rows of text have, how many of them are trained on, and how many rows lost their beginning."""
    texts = [row for row in rows if isinstance(row, EncodedText)]
    return {
        "all": sum(len(row.input_ids) for row in texts),
        "trained": sum(row.trained for row in texts),
        "cut_rows": sum(row.cut for row in texts),
    }
