"""Intervals: they cover, they are paired, and they are the resampling they claim to be."""

import math

import pytest
import torch

from scalabl.core.errors import UserError
from scalabl.metrics import METRICS, Metric, evaluate, is_collapsed, ood_auroc, paired_difference
from scalabl.metrics import bootstrap as module
from scalabl.metrics.bootstrap import interval, resamples
from scalabl.metrics.scores import Rows, accuracy, aurc, auroc, brier, ece, nll


def draw(rows: int, generator: torch.Generator, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from the softmax of random logits; the prediction sharpens these by `sharpness`."""
    logits = 1.5 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
    return (sharpness * logits).softmax(dim=-1), labels


def test_counts_are_what_repeating_the_rows_gives() -> None:
    """Every metric of a resample as counts equals the metric of the repeated rows themselves."""
    probs, labels = draw(60, torch.Generator().manual_seed(0))
    probs = torch.cat([probs[:50], probs[:10]])  # equal confidences too
    counts = next(iter(resamples(60, 5, seed=3)))
    for resample in counts:
        chosen = torch.arange(60).repeat_interleave(resample.long())
        again = Rows.of(probs[chosen], labels[chosen], 15)
        for metric in (accuracy, nll, ece, brier, auroc, aurc):
            weighted = metric(Rows.of(probs, labels, 15), resample[None])
            torch.testing.assert_close(weighted, metric(again, torch.ones(1, 60, dtype=torch.float64)))


def test_resamples_are_uniform_draws_with_replacement() -> None:
    counts = torch.cat(list(resamples(50, 4000, seed=0)))
    assert counts.shape == (4000, 50) and (counts.sum(dim=1) == 50).all()
    assert counts.mean(dim=0).sub(1).abs().max() < 0.08
    assert counts.var().item() == pytest.approx(1 - 1 / 50, abs=0.02)


def test_chunks_are_drawn_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 100)
    chunks = list(resamples(30, 10, seed=0))
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 1]
    assert not torch.equal(chunks[0], chunks[1])
    assert all(torch.equal(a, b) for a, b in zip(chunks, resamples(30, 10, seed=0), strict=True))


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_intervals_cover_the_truth(sharpness: float) -> None:
    """95% intervals hold the figure of a very large sample in about 95 of 100 samples."""
    generator = torch.Generator().manual_seed(7)
    truth = evaluate(*draw(400_000, generator, sharpness), bootstrap=1)
    names = ["accuracy", "nll", "brier", "auroc", "aurc"] + (["ece"] if sharpness > 1 else [])
    covered = dict.fromkeys(names, 0)
    trials = 150
    for _ in range(trials):
        found = evaluate(*draw(300, generator, sharpness), bootstrap=300)
        for name in names:
            covered[name] += found[name].low <= truth[name].value <= found[name].high  # type: ignore[operator]
    for name, hits in covered.items():
        # within 3.5 standard deviations of a binomial of .95
        assert hits / trials >= 0.95 - 3.5 * math.sqrt(0.95 * 0.05 / trials), (name, hits)
    assert covered["accuracy"] < trials  # and they are no wider than they have to be


def test_every_figure_lies_in_its_interval() -> None:
    for sharpness in (0.2, 1.0, 5.0):
        for metric in evaluate(*draw(500, torch.Generator().manual_seed(1), sharpness)).values():
            assert metric.low <= metric.value <= metric.high  # type: ignore[operator]


def test_interval_is_the_percentiles_of_unbiased_draws() -> None:
    draws = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    metric = interval(0.0, draws, 0.9)
    assert (metric.low, metric.high) == pytest.approx((-0.9, 0.9))
    moved = interval(0.0, draws + 5, 0.9)
    assert (moved.low, moved.high) == pytest.approx((-0.9, 0.9))


def test_same_seed_same_interval() -> None:
    rows = draw(200, torch.Generator().manual_seed(0))
    assert evaluate(*rows, seed=4) == evaluate(*rows, seed=4)
    assert evaluate(*rows, seed=4)["nll"].low != evaluate(*rows, seed=5)["nll"].low


def test_paired_difference_is_much_narrower_than_unpaired() -> None:
    probs, labels = draw(500, torch.Generator().manual_seed(0))
    other = 0.98 * probs + 0.02 / 3
    a, b = evaluate(probs, labels), evaluate(other, labels)
    gap = paired_difference(probs, other, labels, "nll")
    assert gap.value == pytest.approx(a["nll"].value - b["nll"].value)  # type: ignore[operator]
    assert gap.high - gap.low < 0.2 * (a["nll"].high - a["nll"].low)  # type: ignore[operator]


@pytest.mark.parametrize("metric", METRICS)
def test_paired_difference_with_itself_is_exactly_zero(metric: str) -> None:
    probs, labels = draw(200, torch.Generator().manual_seed(0))
    assert paired_difference(probs, probs, labels, metric) == Metric(0.0, 0.0, 0.0)


def test_paired_difference_sees_a_better_model() -> None:
    probs, labels = draw(1000, torch.Generator().manual_seed(0))
    gap = paired_difference(probs.pow(4) / probs.pow(4).sum(dim=1, keepdim=True), probs, labels, "nll")
    assert gap.low > 0  # type: ignore[operator]


def test_paired_difference_refuses_an_unknown_metric_and_names_the_known() -> None:
    probs, labels = draw(20, torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match="accuracy, nll, ece, brier, auroc, aurc"):
        paired_difference(probs, probs, labels, "f1")


def test_paired_difference_of_an_undefined_figure_is_none() -> None:
    right = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    gap = paired_difference(right, right, torch.tensor([0, 0]), "auroc")
    assert gap.value is None and gap.reason


@pytest.mark.parametrize("settings", [{"bootstrap": 0}, {"confidence": 1.0}, {"num_bins": 0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        evaluate(*draw(5, torch.Generator().manual_seed(0)), **settings)  # type: ignore[arg-type]


def test_ood_auroc_refuses_empty_sets_and_nan() -> None:
    with pytest.raises(UserError, match="score_out"):
        ood_auroc(torch.ones(3), torch.ones(0))
    with pytest.raises(UserError, match="NaN"):
        ood_auroc(torch.tensor([1.0, math.nan]), torch.ones(2))


def test_a_constant_answer_is_collapsed_whatever_its_ece() -> None:
    labels = torch.tensor([0] * 130 + [1] * 90 + [2] * 90 + [3] * 90)
    probs = torch.tensor([[0.325, 0.225, 0.225, 0.225]]).expand(400, 4)
    metrics = evaluate(probs, labels)
    assert metrics["ece"].value == pytest.approx(0, abs=1e-6)
    reason = is_collapsed(metrics["accuracy"], labels, 4)
    assert reason is not None and "commonest" in reason and "32.5%" in reason


@pytest.mark.parametrize(("number", "reliable"), [(2, False), (12, True)])
def test_few_rows_that_are_all_right_are_not_reliably_above_chance(number: int, reliable: bool) -> None:
    labels = torch.arange(number) % 2
    probs = 0.8 * torch.eye(2, dtype=torch.float64)[labels] + 0.1
    found = evaluate(probs, labels)["accuracy"]
    expected = {2: 0.342380, 12: 0.757506}[number]  # scipy.stats.binomtest(n, n).proportion_ci(method="wilson")
    assert (found.value, found.high) == (1, 1) and found.low == pytest.approx(expected, abs=1e-5)
    assert (is_collapsed(found, labels, 2) is None) == reliable
    wrong = evaluate(probs, 1 - labels)["accuracy"]
    assert (wrong.value, wrong.low) == (0, 0) and wrong.high == pytest.approx(1 - expected, abs=1e-5)


def test_chance_is_the_mean_over_rows_with_different_numbers_of_choices() -> None:
    labels = torch.arange(400) % 4
    below, above = Metric(0.30, 0.26, 0.34), Metric(0.50, 0.45, 0.55)
    num_choices = torch.tensor([2, 4]).repeat(200)  # chance .375
    assert "random guessing (37.5%)" in (is_collapsed(Metric(0.40, 0.35, 0.45), labels, num_choices) or "")
    assert is_collapsed(below, labels, 4) is None
    assert is_collapsed(above, labels, num_choices) is None
