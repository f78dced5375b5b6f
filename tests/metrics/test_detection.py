"""Figures of a score of scope against scikit-learn's, with ties, and of resamples against the figure itself."""

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from scalabl.metrics.detection import detection_draws, judge_detection
from scalabl.metrics.figures import ood_auroc


def scores(ties: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    known = torch.randn(150, generator=generator).double()
    other = 1 + torch.randn(80, generator=generator).double()
    return (known.round(), other.round()) if ties else (known, other)


@pytest.mark.parametrize("ties", [False, True])
def test_as_scikit_learn_has_them(ties: bool) -> None:
    known, other = scores(ties)
    found = judge_detection(known, other, bootstrap=50)
    label = np.r_[np.zeros(150), np.ones(80)]
    score = torch.cat([known, other]).numpy()
    false, true, _ = roc_curve(label, score, drop_intermediate=False)
    assert found["auroc"].value == pytest.approx(roc_auc_score(label, score))
    assert found["aupr"].value == pytest.approx(average_precision_score(label, score))
    assert found["fpr95"].value == pytest.approx(false[np.argmax(true >= 0.95)])
    assert found["auroc"] == ood_auroc(known, other, bootstrap=50)
    for metric in found.values():
        assert metric.low is not None and metric.high is not None and metric.value is not None
        assert metric.low <= metric.value <= metric.high


def test_a_resample_is_the_figure_of_its_rows() -> None:
    known, other = scores(ties=True)
    draws = detection_draws(known, other, 3, 7)
    from scalabl.metrics.bootstrap import resamples

    of_out = torch.cat(list(resamples(80, 3, 7)))[1].long()
    of_in = torch.cat(list(resamples(150, 3, 8)))[1].long()
    alone = judge_detection(known.repeat_interleave(of_in), other.repeat_interleave(of_out), bootstrap=1)
    for name, (_, values) in draws.items():
        assert values[1].item() == pytest.approx(alone[name].value)


def test_resamples_in_chunks_of_any_size_are_judged_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = scores(ties=True)
    expected = detection_draws(known, other, 230, 7)
    from scalabl.metrics import bootstrap

    monkeypatch.setattr(bootstrap, "_CHUNK", 150 * 90)  # 90 resamples of one set in memory, 168 of the other
    for name, (value, values) in detection_draws(known, other, 230, 7).items():
        assert value == expected[name][0] and values.shape == (230,)
        torch.testing.assert_close(values, expected[name][1])


def test_not_all_resamples_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = scores(ties=True)
    from scalabl.metrics import bootstrap, detection

    monkeypatch.setattr(bootstrap, "_CHUNK", 150 * 100)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = []

    def watched(rows: int, number: int, seed: int) -> Iterator[torch.Tensor]:
        for chunk in bootstrap.resamples(rows, number, seed):
            alive.append(weakref.ref(chunk))
            most.append(sum(each() is not None for each in alive))
            yield chunk

    monkeypatch.setattr(detection, "resamples", watched)
    detection_draws(known, other, 1000, 7)
    assert len(alive) > 10 and max(most) <= 5  # a chunk of each set, and the one that is drawn


def test_a_perfect_and_a_blind_score() -> None:
    perfect = judge_detection(torch.zeros(20), torch.ones(10), bootstrap=5)
    assert [perfect[name].value for name in ("auroc", "aupr", "fpr95")] == [1, 1, 0]
    blind = judge_detection(torch.zeros(20), torch.zeros(10), bootstrap=5)
    assert [blind[name].value for name in ("auroc", "aupr", "fpr95")] == [0.5, pytest.approx(1 / 3), 1]
