"""When a row has enough particles: the bound against what it promises, on populations whose full average is known."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from scalabl.predictive.adaptive import settled

N, BLOCK = 32, 4
LOOKS = (N - 1) // BLOCK


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decision(probs: Tensor, threshold: float | None) -> Tensor:
    """(N, B, C) -> (B,) the most probable choice, or -1 to abstain."""
    confidence, best = probs.mean(dim=0).max(dim=-1)
    return best if threshold is None else best.masked_fill(confidence < threshold, -1)


def stopped(probs: Tensor, confidence: float, threshold: float | None = None) -> tuple[Tensor, Tensor]:
    """(B,) particles taken by each row and its decision then."""
    total, rows, classes = probs.shape
    choices = torch.full((rows,), classes)
    used, found = torch.full((rows,), total), decision(probs, threshold)
    for n in range(total - total % BLOCK, 0, -BLOCK):
        done = settled(probs[:n], choices, total, confidence=confidence, looks=LOOKS, threshold=threshold)
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


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize(
    "probs",
    [bernoulli(), *(logistic_normal(*case) for case in ((0.1, 0.1, 2), (0.3, 3.0, 2), (1.0, 1.0, 4), (2.0, 6.0, 3)))],
    ids=["bernoulli", "close", "wide", "four", "sure"],
)
def test_the_decision_is_that_of_all_particles_at_the_stated_rate(probs: Tensor, threshold: float | None) -> None:
    full = decision(probs, threshold)
    for confidence in (0.8, 0.95):
        used, found = stopped(probs, confidence, threshold)
        wrong = int((found != full).sum())
        # not a chance in 10,000 that a rate of 1 - confidence would show so few
        assert stats.binomtest(wrong, len(full), 1 - confidence, alternative="greater").pvalue > 1e-4
        assert torch.equal(found[used == N], full[used == N])
    assert used.double().mean() < N - 0.5


def test_a_bound_that_asks_for_more_settles_less() -> None:
    probs = logistic_normal(1.0, 1.0, 3, rows=500)
    taken = [stopped(probs, confidence)[0] for confidence in (0.5, 0.8, 0.95, 0.999, 1.0)]
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


def test_choices_that_a_row_lacks_change_nothing() -> None:
    probs = logistic_normal(2.0, 1.0, 3, rows=300)[:8]
    padded = torch.cat([probs, torch.zeros(8, 300, 2, dtype=torch.float64)], dim=-1)
    for threshold in (None, 0.5):
        here, there = (
            settled(p, torch.full((300,), 3), N, confidence=0.8, looks=3, threshold=threshold) for p in (probs, padded)
        )
        assert torch.equal(here, there) and 0 < here.sum() < 300


def test_one_choice_is_settled_and_a_tie_is_not() -> None:
    one = torch.ones(4, 1, 2) * torch.tensor([1.0, 0.0])
    tie = torch.full((4, 1, 2), 0.5)
    assert settled(one, torch.tensor([1]), N, confidence=0.99).all()
    assert not settled(tie, torch.tensor([2]), N, confidence=0.01).any()
    # in a tie below the threshold there is nothing to choose
    assert settled(tie, torch.tensor([2]), N, confidence=0.5, threshold=0.95).all()
    assert settled(tie, torch.tensor([2]), 4, confidence=1.0).all()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_thresholds_at_the_ends(threshold: float) -> None:
    probs = logistic_normal(1.0, 1.0, 2, rows=200)
    used, found = stopped(probs, 0.9, threshold)
    assert torch.equal(found, decision(probs, threshold))
    if threshold == 0:
        assert torch.equal(used, stopped(probs, 0.9)[0])
