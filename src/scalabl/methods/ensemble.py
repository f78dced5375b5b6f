"""Deep ensemble (Lakshminarayanan et al. 2017, 1612.01474): independently trained LoRAs, averaged.

    p(y | x) = 1/M sum_m p(y | x, theta_m),   the members as adapters of one base model

Nothing is trained here: the members are finished runs of other seeds, and this run is the first of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.methods.saved import SavedMethod
from scalabl.predictive.base import Predictive
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.scoring.base import Batch
from scalabl.scoring.scorer import Scorer
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


class Ensemble(SavedMethod):
    """Finished runs of other seeds as members; one pass a member."""

    def fit(
        self,
        run: Run,
        train_rows: Sequence[Example],
        validation_rows: Sequence[Example],
        *,
        members: Sequence[Path] = (),
        batch_size: int = 8,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Note down the other members; no row is read.

        Raises:
            UserError: there is no other member, one of them is not finished, or differs in more than its seed.
        """
        self.directory_of(run)
        assert run.directory is not None
        listed = []
        for member in members:
            record = RunRecord.read_finished(member)
            _require_alike(run.record, record, member)
            path = os.path.relpath(member.resolve(), run.directory.resolve())
            listed.append({"path": path, "seed": record.recipe["seed"], "adapter_sha256": record.adapter_sha256})
        digests = {run.record.adapter_sha256, *(m["adapter_sha256"] for m in listed)}
        if len(digests) < 2 or len(digests) <= len(listed):
            raise UserError("An ensemble needs members that differ; give the directories of runs of other seeds.")
        return self.save(run, {"members": listed})

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        """One pass a member.

        Raises:
            UserError: a member is gone or was trained anew since.
        """
        facts = self.facts(run)
        assert run.directory is not None
        model: Any = run.scorer.model
        adapters = [active_adapters(model)[0]]
        for number, member in enumerate(facts["members"], start=1):
            directory, name = run.directory / member["path"], f"member{number}"
            if RunRecord.read_finished(directory).adapter_sha256 != member["adapter_sha256"]:
                raise UserError(f"The member {directory} was trained anew since; fit ensemble again.")
            if name not in model.peft_config:
                model.load_adapter(str(directory), adapter_name=name)
            adapters.append(name)
        model.eval()
        return EnsemblePredictive(adapters)

    def extra_numbers(self, run: Run, facts: dict[str, Any], saved: int) -> int:
        lora: int = run.record.parameters["lora"]
        return lora * len(facts["members"])


def _require_alike(own: RunRecord, other: RunRecord, member: Path) -> None:
    """Refuse a member that differs in more than its seed."""
    free = ("seed", "save_steps")
    for name, value in own.recipe.items():
        if name not in free and value != other.recipe.get(name):
            raise UserError(
                f"The member {member} differs in {name} ({other.recipe.get(name)}, here {value}); "
                "give runs that differ in their seed alone."
            )
    if own.scoring != other.scoring:
        raise UserError(f"The member {member} scores otherwise than this run; train it with the same scoring.")
