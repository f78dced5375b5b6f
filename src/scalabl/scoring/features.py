"""One pass at the posterior mean: how large a row's class logits are, and what a classification head's last layer sees.

The features of a row are the input of the head's final linear layer: the pooled token behind the head's own
transformations, in a decoder the hidden state of the last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.layers import decoder_layers, sequence_classifier
from scalabl.tuner.threads import own


def final_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of a classification head with a logit a label; the one that a pass calls last is the final one.

    There is a second one where a pooler is as wide as there are labels, and where PEFT keeps the untrained head.
    """
    base = sequence_classifier(model)
    if base is None:
        return []
    inside = {id(module) for module in decoder_layers(model).modules()}
    return [
        module
        for module in base.modules()
        if isinstance(module, nn.Linear) and module.out_features == base.config.num_labels and id(module) not in inside
    ]


def feature_size(model: nn.Module) -> int | None:
    """How many features a row has; None for a model without a classification head that ends in a linear layer."""
    layers = final_layers(model)
    return layers[-1].in_features if layers else None


class MeanPass:
    """A predictive whose (1, B, 1 + d) holds no probabilities but -log sum_c exp(logit_c), then the d features."""

    name = "mean pass"

    def __init__(self, model: nn.Module) -> None:
        self.layers: Sequence[nn.Linear] = final_layers(model)
        self.size = feature_size(model) or 0

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        seen: list[Tensor] = []

        def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["input"])

        handles = [layer.register_forward_pre_hook(own(see), with_kwargs=True) for layer in self.layers]
        try:
            energy = -scorer.class_logits(batch).float().logsumexp(dim=-1)
        finally:
            for handle in handles:
                handle.remove()
        if not self.layers:
            return energy[None, :, None]
        features = seen[-1].float()
        if features.dim() == 3:  # a decoder's head is applied to every token, and the last one's logits are taken
            last = (batch.segments >= 0).sum(dim=1) - 1
            features = features[torch.arange(len(features), device=features.device), last]
        return torch.cat([energy[:, None], features], dim=1)[None]
