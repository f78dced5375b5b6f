"""The distance to a run's training rows: fitted at the end of a training, and kept beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from scalabl.core.files import FEATURES, sha256, writing
from scalabl.metrics.distance import FeatureDistance
from scalabl.predictive.base import predict
from scalabl.scoring.base import Encoded
from scalabl.scoring.features import MeanPass
from scalabl.scoring.scorer import Scorer


def fit_distance(scorer: Scorer, rows: Sequence[Encoded]) -> FeatureDistance | None:
    """The distance to training rows in the features of a classification head, from one pass at the posterior mean; None
    where there is no such head, or rows have no label.

    A row with several labels is a row of each of these classes, and those without any are a class of their own.
    """
    mean_pass = MeanPass(scorer.model)
    if not mean_pass.size or not all(row.is_labelled for row in rows):
        return None
    found = predict(scorer, rows, mean_pass, batch_size=32)
    of_rows = [_classes(row) for row in rows]
    place = [i for i, classes in enumerate(of_rows) for _ in classes]
    labels = torch.tensor([label for classes in of_rows for label in classes])
    return FeatureDistance.fit(found[0, place, 1 : 1 + mean_pass.size], labels)


def _classes(row: Encoded) -> list[int]:
    """The classes that a row is of; one behind the labels where it has none of them."""
    if row.marks is None:
        assert row.answer is not None
        return [row.answer]
    return [label for label, has in enumerate(row.marks) if has] or [len(row.marks)]


def write_features(output: Path, distance: FeatureDistance | None) -> str | None:
    """Keep the distance beside the adapter: the digest of its file, for the run's record; None where there is none."""
    if distance is None:
        return None
    with writing(output / FEATURES) as unfinished:
        save_file(distance.tensors(), unfinished)
    return sha256(output / FEATURES)
