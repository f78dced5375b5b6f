"""Deep ensemble: p(y | x) = 1/M sum_m p(y | x, theta_m), the members as adapters of one base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalabl.errors import UserError
from scalabl.scoring import Batch, Scorer
from scalabl.tuner.layers import active_adapters


class EnsemblePredictive:
    """One pass a member, each with its own adapter; particle m is member m [Lakshminarayanan et al. 2017].

    Args:
        adapters: names of the members' adapters in the model.

    Raises:
        UserError: there is no member.
    """

    name = "ensemble"

    def __init__(self, adapters: Sequence[str]) -> None:
        if not adapters:
            raise UserError("An ensemble needs members; give the directories of runs of other seeds.")
        self.adapters = list(adapters)
        self.samples = len(self.adapters)

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        before = active_adapters(scorer.model)[0]
        members = []
        try:
            for adapter in self.adapters:
                scorer.model.set_adapter(adapter, inference_mode=True)
                members.append(scorer.class_log_probs(batch))
        finally:
            scorer.model.set_adapter(before, inference_mode=True)
        return torch.stack(members)
