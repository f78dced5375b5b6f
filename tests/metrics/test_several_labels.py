"""Figures of rows that may have several labels: by hand, and their bootstrap by rows computed directly."""

from __future__ import annotations

import pytest
import torch

from scalabl.core.errors import UserError
from scalabl.metrics import evaluate, paired_difference
from scalabl.metrics.bootstrap import by_rows, interval, resamples
from scalabl.metrics.calibration import fit_calibration
from scalabl.metrics.per_class import per_label
from scalabl.metrics.several_labels import evaluate_sets, label_probs, wrong_rows

PROBS = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.7, 0.1], [0.4, 0.8, 0.3], [0.1, 0.1, 0.2]], dtype=torch.float64)
MARKS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])


def as_questions(probs: torch.Tensor) -> torch.Tensor:
    return torch.stack([1 - probs, probs], dim=-1).flatten(0, 1)


def test_sets_of_labels_by_hand() -> None:
    found = evaluate_sets(PROBS, MARKS, bootstrap=20)
    assert found["subset_accuracy"].value == 2 / 4  # one label too many, and one missing
    # label 0: 1 hit, 1 false, 1 missed; label 1: 2 hits; label 2: neither there nor given
    assert found["micro_f1"].value == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["macro_f1"].value == pytest.approx((2 / 4 + 1) / 2)
    nothing = evaluate_sets(PROBS[3:], MARKS[3:], bootstrap=5)
    assert nothing["subset_accuracy"].value == 1 and nothing["micro_f1"].value is None
    assert nothing["micro_f1"].reason == "no row has a label and none is given"
    labels = per_label(PROBS, MARKS)
    assert [(f.support, f.precision, f.recall) for f in labels] == [(2, 0.5, 0.5), (2, 1.0, 1.0), (0, None, None)]
    # four rows in bins of their own
    assert labels[1].ece == pytest.approx((0.2 + 0.3 + 0.2 + 0.1) / 4)
    with pytest.raises(UserError, match="must both have the shape"):
        evaluate_sets(PROBS, MARKS[:, :2])
    log_probs = as_questions(PROBS).log()[None]
    torch.testing.assert_close(label_probs(log_probs, 3), PROBS)
    assert wrong_rows(log_probs, MARKS.flatten(), 3).tolist() == [False, True, True, False]


def test_questions_of_a_row_are_drawn_together() -> None:
    torch.manual_seed(0)
    rows, labels = 40, 5
    probs = torch.rand(rows, 1).expand(-1, labels) * 0.6 + torch.rand(rows, labels) * 0.4  # alike within a row
    marks = (torch.rand(rows, labels) < probs).long()
    probs = probs.double()
    questions, answers = as_questions(probs), marks.flatten()
    found = evaluate(questions, answers, bootstrap=200, per_row=labels)
    right = ((probs > 0.5) == (marks == 1)).double().mean(dim=1)
    nll = -torch.where(marks == 1, probs, 1 - probs).log().mean(dim=1)
    counts = torch.cat(list(resamples(rows, 200, 0)))
    for name, of_row in (("accuracy", right), ("nll", nll)):
        direct = interval(of_row.mean().item(), counts @ of_row / rows, 0.95)
        assert found[name].value == pytest.approx(direct.value)
        assert (found[name].low, found[name].high) == pytest.approx((direct.low, direct.high))
    exact = ((probs > 0.5) == (marks == 1)).all(dim=1).double()
    subset = evaluate_sets(probs, marks, bootstrap=200)["subset_accuracy"]
    direct = interval(exact.mean().item(), counts @ exact / rows, 0.95, (0, 1))
    assert (subset.value, subset.low, subset.high) == pytest.approx((direct.value, direct.low, direct.high))

    other = (probs * 0.8).clamp(0.05, 0.95)
    apart = paired_difference(questions, as_questions(other), answers, "nll", bootstrap=200, per_row=labels)
    gaps = nll + torch.where(marks == 1, other, 1 - other).log().mean(dim=1)
    direct = interval(gaps.mean().item(), counts @ gaps / rows, 0.95)
    assert (apart.value, apart.low, apart.high) == pytest.approx((direct.value, direct.low, direct.high))
    # a thousand questions that are copies of one another say no more than the row does
    copies = evaluate(questions[::labels].repeat_interleave(7, dim=0), answers[::labels].repeat_interleave(7),
                      bootstrap=50, per_row=7)  # fmt: skip
    alone = evaluate(questions[::labels], answers[::labels], bootstrap=50)
    for name in ("accuracy", "nll", "ece", "brier", "auroc"):
        assert (copies[name].value, copies[name].low) == pytest.approx((alone[name].value, alone[name].low))


def test_many_questions_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = torch.cat(list(resamples(6, 9, 1)))
    seen: list[int] = []

    def figure(part: torch.Tensor) -> torch.Tensor:
        seen.append(len(part))
        return part @ torch.arange(12).double()

    whole = by_rows(figure, 2)(counts)
    monkeypatch.setattr("scalabl.metrics.bootstrap._CHUNK", 48)
    assert torch.equal(by_rows(figure, 2)(counts), whole) and seen == [9, 4, 4, 1]


def test_a_scale_is_told_apart_by_rows() -> None:
    """Copies of a question do not make a gain sure that the row itself does not show."""
    torch.manual_seed(3)
    logits = torch.randn(40)
    labels = (torch.rand(40) < logits.sigmoid()).long()

    def predicted(copies: int) -> object:
        def at(scale: float) -> torch.Tensor:
            z = (logits + 0.7 * (scale - 1)).repeat_interleave(copies)
            return torch.stack([-z, z], dim=-1).mul(0.5).log_softmax(dim=-1)[None]

        return at

    alone = fit_calibration(predicted(1), labels)  # type: ignore[arg-type]
    several = fit_calibration(predicted(9), labels.repeat_interleave(9), per_row=9)  # type: ignore[arg-type]
    assert (several.scale, several.before, several.after) == pytest.approx((alone.scale, alone.before, alone.after))
    assert several.tried.keys() == alone.tried.keys()
