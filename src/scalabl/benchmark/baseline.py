"""What an entry is compared with: the plain LoRA of the same task and seed whose settings differ least. No torch."""

from __future__ import annotations

from scalabl.benchmark.plan import Entry, Plan
from scalabl.benchmark.study import Study, Variant

# what makes a training run another method's does not count as a difference
_OWN = ("method", "weight_decay", "lora_dropout")


def baseline_variant(study: Study, variant: Variant) -> Variant | None:
    """The MLE variant of a study that a variant is compared with; None if there is none."""
    plain = [other for other in study.variants if other.method == "mle"]
    if not plain:
        return None
    own = study.recipe(variant, study.tasks[0], study.seeds[0]).as_dict()

    def differences(other: Variant) -> int:
        theirs = study.recipe(other, study.tasks[0], study.seeds[0]).as_dict()
        return sum(own[name] != theirs[name] for name in own if name not in _OWN)

    return min(plain, key=differences)


def baseline_of(study: Study, plan: Plan, entry: Entry) -> Entry | None:
    """The MLE entry of the same task and (first) seed."""
    mle = baseline_variant(study, entry.variant)
    matches = (e for e in plan.entries if e.variant == mle and e.task == entry.task and e.seeds[0] == entry.seeds[0])
    return next(matches, None)
