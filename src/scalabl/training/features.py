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
    where there is no such head, or rows have no single label.
    """
    mean_pass = MeanPass(scorer.model)
    labels = [row.answer for row in rows]
    if not mean_pass.size or not all(isinstance(label, int) for label in labels):
        return None
    found = predict(scorer, rows, mean_pass, batch_size=32)
    return FeatureDistance.fit(found[0, :, 1 : 1 + mean_pass.size], torch.tensor(labels))


def write_features(output: Path, distance: FeatureDistance | None) -> str | None:
    """Keep the distance beside the adapter: the digest of its file, for the run's record; None where there is none."""
    if distance is None:
        return None
    with writing(output / FEATURES) as unfinished:
        save_file(distance.tensors(), unfinished)
    return sha256(output / FEATURES)
