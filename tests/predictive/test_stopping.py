"""When a row has enough particles: the bounds against what they promise, on populations whose full average is known."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from scalabl.predictive.adaptive import _wealth, settled

N, BLOCK = 32, 4
LOOKS = (N - 1) // BLOCK


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decision(probs: Tensor, threshold: float | None) -> Tensor:
    """(N, B, C) -> (B,) the most probable choice, or -1 to abstain."""
    confidence, best = probs.mean(dim=0).max(dim=-1)
    return best if threshold is None else best.masked_fill(confidence < threshold, -1)


def stopped(probs: Tensor, confidence: float, bound: str, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """(B,) particles taken by each row and its decision then."""
    total, rows, classes = probs.shape
    choices = torch.full((rows,), classes)
    used, found = torch.full((rows,), total), decision(probs, threshold)
    for n in range(total - total % BLOCK, 0, -BLOCK):
        done = settled(probs[:n], choices, total, confidence=confidence, looks=LOOKS, threshold=threshold, bound=bound)
        used[done] = n
        found[done] = decision(probs[:n, done], threshold)
    return used, found


def logistic_normal(mean: float, std: float, classes: int, rows: int = 4000) -> Tensor:
    logits = std * torch.randn(N, rows, classes, generator=rng(), dtype=torch.float64)
    logits[..., 0] += mean
    return logits.softmax(dim=-1)


def bernoulli(rows: int = 4000) -> Tensor:
    """Particles that are sure of one of two answers, with a rate of their own in every row."""
    rate = 0.5 + 0.5 * torch.rand(rows, generator=rng(1), dtype=torch.float64)
    votes = (torch.rand(N, rows, generator=rng(2), dtype=torch.float64) < rate).double()
    return torch.stack([votes, 1 - votes], dim=-1)


@pytest.mark.parametrize("bound", ["t", "betting"])
@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize(
    "probs",
    [bernoulli(), *(logistic_normal(*case) for case in ((0.1, 0.1, 2), (0.3, 3.0, 2), (1.0, 1.0, 4), (2.0, 6.0, 3)))],
    ids=["bernoulli", "close", "wide", "four", "sure"],
)
def test_the_decision_is_that_of_all_particles_at_the_stated_rate(
    probs: Tensor, threshold: float | None, bound: str
) -> None:
    full = decision(probs, threshold)
    for confidence in (0.8, 0.95):
        used, found = stopped(probs, confidence, bound, threshold)
        wrong = int((found != full).sum())
        # not a chance in 10,000 that a rate of 1 - confidence would show so few
        assert stats.binomtest(wrong, len(full), 1 - confidence, alternative="greater").pvalue > 1e-4
        assert torch.equal(found[used == N], full[used == N])
    assert used.double().mean() < N - 0.5


def test_betting_holds_where_the_particles_are_far_from_normal() -> None:
    """Nearly all particles agree a little and a few disagree strongly: the first ones do not show it."""
    rare = torch.rand(N, 4000, generator=rng(), dtype=torch.float64) < 0.05
    lead = torch.where(rare, -0.95, 0.05) + 1e-3 * torch.randn(N, 4000, generator=rng(1), dtype=torch.float64)
    probs = torch.stack([1 + lead, 1 - lead], dim=-1) / 2
    full = decision(probs, None)
    rate = {bound: (stopped(probs, 0.95, bound)[1] != full).double().mean().item() for bound in ("t", "betting")}
    assert rate["betting"] <= 0.05 < 0.2 < rate["t"]


def test_a_bound_that_asks_for_more_settles_less() -> None:
    probs = logistic_normal(1.0, 1.0, 3, rows=500)
    for bound in ("t", "betting"):
        taken = [stopped(probs, confidence, bound)[0] for confidence in (0.5, 0.8, 0.95, 0.999, 1.0)]
        assert all((a <= b).all() for a, b in zip(taken, taken[1:], strict=False))
        assert (taken[0] < taken[3]).any() and (taken[-1] == N).all()
    few, many = (settled(probs[:4], torch.full((500,), 3), N, confidence=0.9, looks=looks) for looks in (1, 7))
    assert (many <= few).all() and many.sum() < few.sum()


def test_t_is_the_prediction_interval_of_the_average_of_all() -> None:
    values = 0.3 + 0.2 * torch.randn(6, 1, generator=rng(), dtype=torch.float64)
    probs = torch.stack([(1 + values) / 2, (1 - values) / 2], dim=-1)
    mean, std = values.mean().item(), values.std().item()
    # one comparison, three looks: mean = quantile * std * sqrt(1/n - 1/N) at this level
    level = 3 * stats.t.sf(mean / (std * (1 / 6 - 1 / 20) ** 0.5), 5)
    for confidence, expected in ((1 - 1.01 * level, True), (1 - 0.99 * level, False)):
        assert settled(probs, torch.tensor([2]), 20, confidence=confidence, looks=3).item() is expected


def test_a_gambler_seldom_wins_against_the_truth() -> None:
    """N values that average exactly 0, in random order: wealth 1 / level at most at the level [Ville 1939]."""
    for low, skew in ((-1.0, 1.0), (-0.7, 3.0), (-0.2, 1.0)):
        values = torch.rand(16, 4000, generator=rng(), dtype=torch.float64) ** skew
        values = (values - values.mean(dim=0)) * 0.2 / values.max()  # sums to 0, above -0.2
        for level in (0.2, 0.05):
            reached = int((_wealth(values[:-1], low, 16) >= 1 / level).sum())
            assert stats.binomtest(reached, 4000, level, alternative="greater").pvalue > 1e-4
    # and wins at once where there is something to win
    assert (_wealth(torch.full((8, 1), 0.8, dtype=torch.float64), -1.0, 16) > 100).all()


def test_wealth_is_infinite_exactly_where_the_rest_cannot_turn_the_average() -> None:
    values = 2 * torch.rand(6, 2000, generator=rng(), dtype=torch.float64) - 1
    certain = values.sum(dim=0) - 4 > 0  # the four that are left cannot be below -1
    assert torch.equal(_wealth(values, -1.0, 10).isinf(), certain) and 0 < certain.sum() < 2000


def test_choices_that_a_row_lacks_change_nothing() -> None:
    probs = logistic_normal(2.0, 1.0, 3, rows=300)[:8]
    padded = torch.cat([probs, torch.zeros(8, 300, 2, dtype=torch.float64)], dim=-1)
    for bound in ("t", "betting"):
        for threshold in (None, 0.5):
            here, there = (
                settled(p, torch.full((300,), 3), N, confidence=0.8, looks=3, threshold=threshold, bound=bound)
                for p in (probs, padded)
            )
            assert torch.equal(here, there) and 0 < here.sum() < 300


def test_one_choice_is_settled_and_a_tie_is_not() -> None:
    one = torch.ones(4, 1, 2) * torch.tensor([1.0, 0.0])
    tie = torch.full((4, 1, 2), 0.5)
    for bound in ("t", "betting"):
        assert settled(one, torch.tensor([1]), N, confidence=0.99, bound=bound).all()
        assert not settled(tie, torch.tensor([2]), N, confidence=0.01, bound=bound).any()
        # in a tie below the threshold there is nothing to choose
        assert settled(tie, torch.tensor([2]), N, confidence=0.5, threshold=0.95, bound=bound).all()
        assert settled(tie, torch.tensor([2]), 4, confidence=1.0, bound=bound).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_at_the_ends(threshold: float) -> None:
    probs = logistic_normal(1.0, 1.0, 2, rows=200)
    for bound in ("t", "betting"):
        used, found = stopped(probs, 0.9, bound, threshold)
        assert torch.equal(found, decision(probs, threshold))
        if threshold == 0:
            assert torch.equal(used, stopped(probs, 0.9, bound)[0])
