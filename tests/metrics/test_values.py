"""The figures themselves: against torchmetrics, scikit-learn and sums done by hand."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)

from scalabl.core.errors import UserError
from scalabl.metrics import evaluate, ood_auroc, reliability, risk_coverage
from scalabl.metrics.per_class import per_class


def predictions(rows: int = 400, choices: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(choices, (rows,), generator=generator)
    logits = 1.5 * torch.randn(rows, choices, generator=generator)
    logits[torch.arange(rows), labels] += 1
    return logits.double().softmax(dim=-1), labels


def values(probs: torch.Tensor, labels: torch.Tensor, **settings: int) -> dict[str, float | None]:
    return {name: metric.value for name, metric in evaluate(probs, labels, bootstrap=1, **settings).items()}


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_agrees_with_the_libraries(num_bins: int) -> None:
    probs, labels = predictions()
    found = values(probs, labels, num_bins=num_bins)
    confidence, answer = probs.max(dim=-1)
    correct = (answer == labels).long()
    assert found["accuracy"] == pytest.approx(multiclass_accuracy(probs, labels, 4, average="micro").item())
    ece = multiclass_calibration_error(probs, labels, 4, n_bins=num_bins).item()
    assert found["ece"] == pytest.approx(ece, abs=1e-6)
    assert found["auroc"] == pytest.approx(binary_auroc(confidence, correct).item(), abs=1e-6)
    assert found["auroc"] == pytest.approx(roc_auc_score(correct, confidence))
    assert found["nll"] == pytest.approx(log_loss(labels, probs))
    truth = torch.nn.functional.one_hot(labels, 4)
    assert found["brier"] == pytest.approx((probs - truth).square().sum(dim=-1).mean().item())


def test_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
    found = values(probs, torch.tensor([0, 1, 1, 0]))
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.4) + math.log(0.7) + math.log(0.2)) / 4)
    assert found["brier"] == pytest.approx((0.02 + 0.72 + 0.18 + 1.28) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.3 + 0.8) / 4)
    assert found["auroc"] == pytest.approx(3 / 4)  # right .9 .7, wrong .8 .6
    assert found["aurc"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)


def test_confidence_of_one_is_in_the_last_bin() -> None:
    probs = torch.tensor([[1.0, 0.0], [0.95, 0.05]])
    # Together: accuracy 1/2, confidence .975; apart they would be |1 - 1| / 2 + |0 - .95| / 2.
    assert values(probs, torch.tensor([0, 1]))["ece"] == pytest.approx(0.475)


def test_auroc_counts_ties_half() -> None:
    confidence = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.6, 0.6])
    correct = torch.tensor([1, 1, 0, 1, 0, 1])
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    assert values(probs, 1 - correct)["auroc"] == pytest.approx(roc_auc_score(correct, confidence))


def test_aurc_of_ties_is_the_mean_over_their_orders() -> None:
    confidence = torch.tensor([0.9, 0.7, 0.7, 0.7, 0.7, 0.6])
    wrong = torch.tensor([1, 0, 1, 1, 0, 0])
    areas = []
    for middle in itertools.permutations([1, 2, 3, 4]):
        errors = wrong[[0, *middle, 5]].cumsum(0)
        areas.append((errors / torch.arange(1, 7)).mean().item())
    probs = torch.stack([confidence, 1 - confidence], dim=1).double()
    assert values(probs, wrong)["aurc"] == pytest.approx(sum(areas) / len(areas))
    assert risk_coverage(probs, wrong)[1].mean().item() == pytest.approx(sum(areas) / len(areas))


def test_order_of_rows_and_names_of_choices_do_not_matter() -> None:
    probs, labels = predictions()
    probs = (probs * 10).round().clamp(min=1)  # many equal confidences
    probs /= probs.sum(dim=1, keepdim=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    before, after = values(probs, labels), values(probs[order], labels[order])
    assert {name: pytest.approx(value) for name, value in before.items()} == after


def test_missing_choices_change_nothing() -> None:
    probs, labels = predictions()
    padded = torch.cat([probs, torch.zeros(len(probs), 2)], dim=1)
    assert values(padded, labels) == {name: pytest.approx(value) for name, value in values(probs, labels).items()}


def test_an_impossible_answer_costs_much_and_stays_finite() -> None:
    nll = values(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0]))["nll"]
    assert nll is not None and 300 < nll < 400


@pytest.mark.parametrize(("labels", "side"), [([0, 0, 0], "right"), ([1, 1, 1], "wrong")])
def test_auroc_is_none_with_a_reason_when_there_is_nothing_to_tell_apart(labels: list[int], side: str) -> None:
    metrics = evaluate(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor(labels))
    assert metrics["auroc"].value is None and side in (metrics["auroc"].reason or "")
    assert all(m.value is not None and m.low is not None for name, m in metrics.items() if name != "auroc")


def test_reliability_bins_carry_the_ece() -> None:
    probs, labels = predictions()
    bins = reliability(probs, labels, 15)
    assert sum(b.count for b in bins) == len(labels)
    gaps = [
        b.count * abs(b.accuracy - b.confidence) for b in bins if b.accuracy is not None and b.confidence is not None
    ]
    assert sum(gaps) / len(labels) == pytest.approx(values(probs, labels)["ece"])
    for b in bins:
        if b.accuracy is not None:
            assert b.low <= b.confidence < b.high  # type: ignore[operator]
            assert 0 <= b.accuracy_low <= b.accuracy <= b.accuracy_high <= 1  # type: ignore[operator]


def test_wilson_interval_of_a_bin() -> None:
    probs = torch.tensor([[0.95, 0.05]]).expand(10, 2)
    last = reliability(probs, torch.tensor([0] * 8 + [1] * 2))[-1]
    # scipy.stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (last.accuracy_low, last.accuracy_high) == pytest.approx((0.49016, 0.94332), abs=1e-5)


def test_risk_coverage_ends_at_the_error_rate() -> None:
    probs, labels = predictions()
    coverage, risk = risk_coverage(probs, labels)
    assert coverage[-1] == 1 and risk[-1].item() == pytest.approx(1 - values(probs, labels)["accuracy"])
    assert risk[: len(risk) // 4].mean() < risk[-1]


def test_ood_auroc() -> None:
    generator = torch.Generator().manual_seed(0)
    known, shifted = torch.randn(300, generator=generator), torch.randn(200, generator=generator) + 1
    expected = roc_auc_score([0] * 300 + [1] * 200, torch.cat([known, shifted]))
    metric = ood_auroc(known, shifted)
    assert metric.value == pytest.approx(expected)
    assert metric.low < expected < metric.high  # type: ignore[operator]
    assert ood_auroc(shifted, known).value == pytest.approx(1 - expected)
    assert ood_auroc(torch.zeros(5), torch.zeros(3)).value == 0.5


GOOD = torch.tensor([[0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (GOOD, torch.tensor([0]), "one label for each row"),
        (GOOD[:0], torch.tensor([], dtype=torch.long), "no rows"),
        (torch.tensor([[0.5, 0.5], [math.nan, 1]]), torch.tensor([0, 1]), "row 1 hold NaN"),
        (
            torch.tensor([[0.5, 0.4], [0.9, 0.1]]),
            torch.tensor([0, 1]),
            "row 0 is no probability distribution",
        ),
        (
            torch.tensor([[0.5, 0.5], [1.5, -0.5]]),
            torch.tensor([0, 1]),
            "row 1 is no probability distribution",
        ),
        (GOOD, torch.tensor([0, 2]), "label 2 of row 1"),
        (GOOD, torch.tensor([-1, 0]), "label -1 of row 0"),
        (GOOD, torch.tensor([0.0, 1.0]), "whole numbers"),
    ],
)
def test_refuses_bad_input(probs: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    for function in (evaluate, risk_coverage, reliability):
        with pytest.raises(UserError, match=message):
            function(probs, labels)


def test_figures_of_each_label_by_hand():
    probs = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.3, 0.6, 0.1]], dtype=torch.float64)
    found = per_class(probs, torch.tensor([0, 1, 1, 1]), num_bins=4)
    assert [each.support for each in found] == [1, 3, 0]
    assert [each.precision for each in found] == [0.5, 1.0, None]
    assert [each.recall for each in found] == [1.0, 2 / 3, None]
    # label 0: 2 rows at 0.8 of which one has it, 2 at 0.3 of which none; label 1: 2 at 0.1, one; 2 at 0.6, both
    assert [each.ece for each in found] == pytest.approx([(0.6 + 0.6) / 4, (0.8 + 0.8) / 4, 0.4 / 4])
    with pytest.raises(UserError, match="no probability distribution"):
        per_class(probs + 1, torch.tensor([0, 1, 1, 1]))
