"""One pass at the posterior mean: how large a row's class logits are, and what a classifier's last layer makes of it.

The features of a row are the hidden states behind the last layer, averaged over its tokens. What the head is given (a
pooled token) is trained to tell labels apart and has forgotten much else: it tells rows of another kind less well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scalabl.scoring.base import Batch
from scalabl.scoring.read_token import whole_rows
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.layers import decoder_layers, sequence_classifier
from scalabl.tuner.threads import own


def feature_size(model: nn.Module) -> int:
    """How many features a row has; 0 for a model without a classification head."""
    base = sequence_classifier(model)
    return 0 if base is None else int(base.config.get_text_config().hidden_size)


class MeanPass:
    """A predictive whose (1, B, 1 + d) holds no probabilities but the energy of the class logits, -log sum_c
    exp(logit_c), then the d features."""

    name = "mean pass"

    def __init__(self, model: nn.Module) -> None:
        self.size = feature_size(model)
        self.last = decoder_layers(model)[-1] if self.size else None

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        seen: list[Tensor] = []

        def see(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = None if self.last is None else self.last.register_forward_hook(own(see))
        try:
            with whole_rows():
                energy = scorer.scoring.likelihood.energy(scorer.class_logits(batch).float())
        finally:
            if handle is not None:
                handle.remove()
        if handle is None:
            return energy[None, :, None]
        real = (batch.segments >= 0)[..., None]
        features = seen[-1].float().masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)
        return torch.cat([energy[:, None], features], dim=1)[None]
