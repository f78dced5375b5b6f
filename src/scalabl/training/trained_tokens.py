"""How many tokens a data set is trained on, as Trainer and TRL's trainers count them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np

from scalabl.core.errors import UserError

IGNORED = -100


def count_trained_tokens(dataset: Iterable[Mapping[str, Any]]) -> int:
    """The labels that are not -100, each row's first one left out: nothing predicts it.

    Args:
        dataset: rows with "labels", for example `SFTTrainer.train_dataset`.

    Raises:
        UserError: rows without labels, a stream without length, or no trained token at all.
    """
    if not isinstance(dataset, Sized):
        raise UserError(
            "The training data is a stream without length, so its trained tokens cannot be counted; give ELBOCallback "
            "their number as num_examples."
        )
    columns = getattr(dataset, "column_names", None)
    if columns and "labels" in columns:
        dataset = dataset.select_columns("labels")  # type: ignore[attr-defined]
    total = 0
    for row in dataset:
        if "labels" not in row:
            raise UserError(
                'The training rows have no "labels" to count; give the data set that the trainer made of them, '
                "SFTTrainer.train_dataset, or the number of trained tokens as num_examples."
            )
        total += int((np.asarray(row["labels"])[1:] != IGNORED).sum())
    if total == 0:
        raise UserError("No label of the training rows is trained on: all of them are -100; look at the masks.")
    return total
