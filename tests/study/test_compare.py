"""The paired bootstrap over rows and seeds, and Student's interval, against closed forms."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from scipy import stats
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.metrics import METRICS, evaluate, paired_difference
from scalabl.metrics.scores import Rows, checked
from scalabl.study.outcomes import Outcome, resampled
from scalabl.study.summary import over_seeds, paired_over_seeds


@dataclass(frozen=True, eq=False)
class Drawn(Outcome):
    probs: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0))


def outcome(probs: Tensor, labels: Tensor) -> Drawn:
    figures = {name: metric.value for name, metric in evaluate(probs, labels, bootstrap=1).items()}
    draws = resampled(Rows.of(*checked(probs, labels), 15), 0)
    return Drawn("m", "t", str(labels.tolist()), figures, draws=draws, probs=probs, labels=labels)


def drawn(seeds: int, n: int, *, spread: float = 0.5, gain: float = 0.0, first: int = 0) -> dict[int, Drawn]:
    """Outcomes on the same n rows: row, seed and both together each move the logits."""
    generator = torch.Generator().manual_seed(first)
    labels = torch.randint(4, (n,), generator=torch.Generator().manual_seed(99))
    rows = torch.randn(n, 4, generator=generator)
    found = {}
    for seed in range(seeds):
        logits = rows + spread * torch.randn(n, 4, generator=generator)
        logits[torch.arange(n), labels] += 0.7 + gain + spread * torch.randn((), generator=generator)
        found[seed] = outcome(logits.double().softmax(dim=-1), labels)
    return found


def row_nll(by_seed: dict[int, Drawn]) -> Tensor:
    """(seeds, n)."""
    return torch.stack([-o.probs.gather(1, o.labels[:, None]).squeeze(1).log() for o in by_seed.values()])


@pytest.mark.parametrize("metric", list(METRICS))
def test_with_one_seed_it_is_the_bootstrap_over_rows(metric: str) -> None:
    a, b = drawn(1, 60, first=1), drawn(1, 60, first=2)
    expected = paired_difference(a[0].probs, b[0].probs, a[0].labels, metric)
    found = paired_over_seeds(a, b, metric)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), abs=1e-12
    )


def test_its_width_is_the_variance_of_rows_and_seeds() -> None:
    a, b = drawn(5, 80, first=3), drawn(5, 80, first=4)
    gap = row_nll(a) - row_nll(b)
    seeds, n = gap.shape
    mean = gap.mean()
    of_seed, of_row = gap.mean(dim=1) - mean, gap.mean(dim=0) - mean
    rest = gap - mean - of_seed[:, None] - of_row
    # counts of seeds and of rows are independent, each of variance (k - 1) / k and covariance -1 / k
    variance = of_seed.square().mean() / seeds + of_row.square().mean() / n + rest.square().mean() / (seeds * n)
    found = paired_over_seeds(a, b, "nll")
    assert found.value == pytest.approx(mean.item())
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * variance.sqrt().item(), rel=0.1)
    # rows alone would have promised more
    assert (found.high - found.low) / 2 > 1.5 * 1.96 * (of_row.square().mean() / n).sqrt().item()


def test_sides_are_opposite_and_equals_are_equal() -> None:
    a, b = drawn(3, 50, first=5), drawn(3, 50, first=6, gain=1.0)
    there, back = paired_over_seeds(a, b, "nll"), paired_over_seeds(b, a, "nll")
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-9)  # type: ignore[operator]
    assert there.low is not None and there.low > 0  # b is better
    same = paired_over_seeds(a, a, "ece")
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_seeds_in_common_are_compared_and_rows_have_to_agree() -> None:
    a, b = drawn(3, 40, first=7), drawn(3, 40, first=8)
    assert paired_over_seeds({0: a[0], 9: a[1]}, b, "nll") == paired_over_seeds({0: a[0]}, {0: b[0]}, "nll")
    with pytest.raises(UserError, match="no seed in common"):
        paired_over_seeds({7: a[0]}, b, "nll")
    with pytest.raises(UserError, match="not tested on the same rows"):
        paired_over_seeds(a, drawn(3, 41), "nll")
    with pytest.raises(UserError, match="no metric 'ood_auroc'"):
        paired_over_seeds(a, b, "ood_auroc")


def test_what_is_undefined_is_not_compared() -> None:
    labels = torch.zeros(5, dtype=torch.long)
    right = {0: outcome(torch.tensor([[0.9, 0.1]]).double().repeat(5, 1), labels)}
    assert paired_over_seeds(right, right, "auroc").value is None


def test_the_interval_over_seeds() -> None:
    values = [1.0, 1.5, 3.0]
    low, high = stats.t.interval(0.95, 2, loc=sum(values) / 3, scale=stats.sem(values))
    mean, half = over_seeds(values)
    assert half is not None and (mean - half, mean + half) == pytest.approx((low, high))
    assert over_seeds([2.0]) == (2.0, None)
    assert math.isclose(over_seeds([2.0, 2.0])[1] or 0.0, 0.0)
