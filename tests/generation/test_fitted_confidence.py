"""A confidence from scores: monotone, exact on disk, and refused where nothing can be fitted."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from scalabl.core.errors import UserError
from scalabl.data.open_questions import OpenQuestion
from scalabl.generation.answer import GeneratedAnswer
from scalabl.generation.confidence import AnswerSettings, Confidence, choose_confidence, fit_confidence, left_out
from scalabl.generation.evaluation import Judged, fit_on
from scalabl.metrics.ranking import judge_confidence

UP = {"good": False, "unsure": True, "noise": True}


def rows(n=300, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    right = rng.random(n) < 1 / (1 + np.exp(-2 * z))
    return {"good": z, "unsure": 3 - z + 0.5 * rng.normal(size=n), "noise": rng.normal(size=n)}, right


@pytest.fixture(params=[("isotonic", ["unsure"]), ("platt", ["unsure"]), ("logistic", ["good", "unsure", "noise"])])
def fitted(request):
    kind, names = request.param
    scores, right = rows()
    return fit_confidence(scores, right, UP, kind=kind, names=names), scores, right


def test_it_is_a_probability_that_is_never_certain(fitted):
    confidence, scores, right = fitted
    found = confidence(scores)
    assert found.shape == (300,) and found.min() >= 1 / 302 and found.max() <= 1 - 1 / 302
    assert judge_confidence(found, right, bootstrap=10)["ece"].value < 0.09
    assert found[right].mean() > found[~right].mean() + 0.2
    extreme = confidence({name: [-math.inf, math.inf] for name in scores})
    assert np.isfinite(extreme).all() and extreme.min() >= 1 / 302 and extreme.max() <= 1 - 1 / 302


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(fitted, tmp_path):
    confidence, scores, _ = fitted
    confidence = replace(confidence, made=AnswerSettings(10, ("\n",), True, "ab"))
    confidence.save(tmp_path / "new" / "confidence.json")
    loaded = Confidence.load(tmp_path / "new" / "confidence.json")
    assert loaded == confidence
    assert (loaded(scores) == confidence(scores)).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["confidence.json"]


def test_one_answer_at_a_time_is_the_same(fitted):
    confidence, scores, _ = fitted
    alone = [confidence({name: values[i] for name, values in scores.items()})[0] for i in range(20)]
    np.testing.assert_allclose(alone, confidence(scores)[:20], rtol=1e-12)


@pytest.mark.parametrize("kind", ["isotonic", "platt"])
@pytest.mark.parametrize("name", ["good", "unsure", "noise"])
def test_surer_is_never_less_likely_right(kind, name):
    for seed in range(4):
        scores, right = rows(60, seed)
        scores[name] = np.round(scores[name], 1)  # with ties
        confidence = fit_confidence(scores, right, UP, kind=kind, names=[name])
        grid = np.linspace(-6, 9, 400)
        step = np.diff(confidence({name: grid}))
        assert ((step <= 1e-12) if UP[name] else (step >= -1e-12)).all()


def test_a_score_that_points_the_wrong_way_says_nothing():
    scores, right = rows()
    confidence = fit_confidence({"good": -scores["good"]}, right, UP, kind="platt")
    found = confidence({"good": [-9.0, 0.0, 9.0]})
    assert found == pytest.approx([right.mean()] * 3, abs=0.01)
    flat = fit_confidence({"good": -scores["good"]}, right, UP)({"good": [-1.0, 0.0, 1.0]})
    assert np.ptp(flat) < 0.1


def test_isotonic_is_scikit_learns():
    scores, right = rows()
    values = np.round(scores["good"], 1)
    found = fit_confidence({"good": values}, right, UP)({"good": np.linspace(-3, 3, 101)})
    expected = IsotonicRegression(out_of_bounds="clip").fit(values, right).predict(np.linspace(-3, 3, 101))
    np.testing.assert_array_equal(found, np.clip(expected, 1 / 302, 1 - 1 / 302))


def test_platt_has_his_targets():
    """At the optimum probabilities and targets have the same sum, and the same product with the score."""
    scores, right = rows()
    confidence = fit_confidence(scores, right, UP, kind="platt", names=["good"])
    n, k = len(right), int(right.sum())
    target = np.where(right, (k + 1) / (k + 2), 1 / (n - k + 2))
    found = 1 / (1 + np.exp(-(confidence.weights[0] * (scores["good"] - confidence.centres[0]) / confidence.scales[0]
                              + confidence.intercept)))  # fmt: skip
    assert found.sum() == pytest.approx(target.sum(), abs=1e-3)
    assert found @ scores["good"] == pytest.approx(target @ scores["good"], abs=1e-2)


def test_platt_stays_finite_where_the_score_separates():
    values = np.arange(40.0)
    confidence = fit_confidence({"good": values}, values >= 20, UP, kind="platt")
    assert 0 < confidence.weights[0] < 100
    found = confidence({"good": values})
    assert found[0] == pytest.approx(1 / 42, abs=0.02) and found[-1] == pytest.approx(1 - 1 / 42, abs=0.02)


def test_several_scores_are_a_logistic_regression():
    """With many rows, targets and penalty hardly matter, and it is scikit-learn's own."""
    scores, right = rows(20_000)
    confidence = fit_confidence(scores, right, UP, kind="logistic", names=["good", "unsure"])
    x = np.stack([scores["good"], scores["unsure"]], axis=1)
    expected = LogisticRegression(C=1e6).fit(x, right).predict_proba(x)[:, 1]
    np.testing.assert_allclose(confidence(scores), expected, atol=0.01)


def test_together_beats_either():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 400))
    right = rng.random(400) < 1 / (1 + np.exp(-2 * (a + b)))
    chosen, table = choose_confidence({"a": a, "b": b}, right, {"a": False, "b": False}, together=[["a", "b"]])
    assert chosen.kind == "logistic" and chosen.scores == ("a", "b")
    assert len(table) == 5 and [row.nll for row in table] == sorted(row.nll for row in table)


def test_rows_left_out_prefer_the_score_that_tells():
    scores, right = rows()
    chosen, table = choose_confidence(scores, right, UP)
    assert chosen.scores == ("good",) and chosen == fit_confidence(scores, right, UP, kind=chosen.kind, names=["good"])
    assert {row.scores for row in table[-2:]} == {("noise",)}
    again = choose_confidence(scores, right, UP, seed=0)[1]
    assert [row.nll for row in again] == [row.nll for row in table]
    assert choose_confidence(scores, right, UP, seed=1)[1][0].nll != table[0].nll


def test_a_row_left_out_does_not_see_its_own_answer():
    """Fitted to its own rows, noise looks like knowledge; left out, it says less than the share of right answers."""
    scores, right = rows(60)
    row = left_out(scores, right, UP, names=["noise"])
    base = np.where(right, np.log(right.mean()), np.log(1 - right.mean())).mean()
    inside = fit_confidence(scores, right, UP, names=["noise"])(scores)
    own = -np.where(right, np.log(inside), np.log1p(-inside)).mean()
    assert own < -base < row.nll


def test_infinite_scores_are_the_ends():
    scores, right = rows(60)
    values = scores["good"].copy()
    top = values.argmax()
    values[values.argsort()[-2]] = values[top]
    expected = fit_confidence({"good": values}, right, UP)
    values[values == values[top]] = np.inf
    with_infinite = fit_confidence({"good": values}, right, UP)
    assert with_infinite({"good": np.inf}) == pytest.approx(expected({"good": np.inf}), abs=1e-12)


def test_nothing_to_learn_is_refused():
    scores, right = rows(40)
    for given, said in (
        ({"right": np.ones(40)}, "Only 0 of 40 validation answers are wrong"),
        ({"right": np.arange(40) < 2}, "Only 2 of 40 validation answers are right"),
        ({"right": right[:30]}, "40 scores and 30 answers"),
        ({"right": right * 0.5}, "right .1. or wrong"),
        ({"kind": "beta"}, "no form of confidence"),
        ({"names": ["good", "noise"]}, "reads one score"),
        ({"names": []}, "reads one score, not 0"),
        ({"names": ["missing"], "higher_is_uncertain": {"missing": True}}, "reads the score 'missing'"),
        ({"higher_is_uncertain": {}}, "high good means"),
        ({"scores": {"good": np.full(40, np.nan)}}, "NaN"),
        ({"scores": {"good": np.ones((40, 2))}}, "one value for each answer"),
    ):
        settings = {"scores": scores, "right": right, "higher_is_uncertain": UP, "names": ["good"]} | given
        with pytest.raises(UserError, match=said):
            fit_confidence(**settings)
    few = {name: values[:19] for name, values in scores.items()}
    with pytest.raises(UserError, match="20 validation answers at least, and there are 19"):
        fit_confidence(few, right[:19], UP, names=["good"])
    for folds in (1, 40):
        with pytest.raises(UserError, match="folds is"):
            left_out(scores, right, UP, names=["good"], folds=folds)
    with pytest.raises(UserError, match="no score to make"):
        choose_confidence({}, right, UP)


def test_scores_that_are_all_equal_give_the_share():
    scores, right = rows(50)
    for kind in ("isotonic", "platt"):
        found = fit_confidence({"good": np.ones(50)}, right, UP, kind=kind)({"good": [1.0, 2.0]})
        assert found == pytest.approx([right.mean()] * 2, abs=0.02)


def test_a_missing_score_is_said(fitted):
    confidence, scores, _ = fitted
    with pytest.raises(UserError, match=f"reads the score {confidence.scores[0]!r}"):
        confidence({})
    with pytest.raises(UserError, match="is NaN"):
        confidence({name: [math.nan] for name in scores})


@pytest.mark.parametrize("change", [
    {"kind": "beta"}, {"version": 1}, {"signs": [2]}, {"signs": []}, {"scores": []}, {"highest": 1.0},
    {"knots": [0.0, 0.0], "heights": [0.1, 0.2]}, {"heights": [0.9, 0.1], "knots": [0.0, 1.0]}, {"knots": []},
    {"knots": [0.0, "x"], "heights": [0.1, 0.2]}, {"lowest": None}, {"knots": [0.0, math.inf], "heights": [0.1, 0.2]},
    {"knots": [0, 10**400], "heights": [0.1, 0.2]}, {"scores": [["good"]]}, {"scores": "g"},
    {"made": {}}, {"made": {"particles": -1, "stop": [], "chat": False, "adapter_sha256": None}},
    {"made": {"particles": 1, "stop": "\n", "chat": False, "adapter_sha256": None}}, {"made": 3},
])  # fmt: skip
def test_a_spoilt_file_is_refused(change, tmp_path):
    scores, right = rows(60)
    path = tmp_path / "confidence.json"
    fit_confidence(scores, right, UP, names=["good"]).save(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match="fit it again"):
        Confidence.load(path)
    content.pop("rows")
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="fit it again"):
        Confidence.load(path)
    with pytest.raises(UserError, match="fit one on validation"):
        Confidence.load(tmp_path / "none.json")


def judged(scores, right):
    answers = [
        GeneratedAnswer("?", "!", 0.5, False, {name: float(values[i]) for name, values in scores.items()}, (), True)
        for i in range(len(right))
    ]
    questions = [OpenQuestion(str(i), "?", ("!",)) for i in range(len(right))]
    return Judged(questions, answers, right.astype(float), right.astype(float), len(right), 0)


def test_several_scores_are_read_together_where_one_says_too_little():
    """Right where the text is likely and its places were narrow; each alone is half of it."""
    generator = np.random.default_rng(0)
    likely, open_places, noise = generator.normal(size=(3, 400))
    right = generator.random(400) < 1 / (1 + np.exp(-3 * (likely - open_places)))
    scores = {"mean_log_probability": likely, "mean_aleatoric": open_places, "max_entropy": noise}
    found = fit_on(judged(scores, right))
    assert found.kind == "logistic" and set(found.scores) == {"mean_log_probability", "mean_aleatoric"}
    # where one score says all, it is taken by itself
    alone = fit_on(judged({"max_entropy": noise, "mean_entropy": likely}, noise + generator.normal(size=400) < 0))
    assert alone.scores == ("max_entropy",)
    # a score that is the same for every answer (one particle has no epistemic part) is not read
    constant = fit_on(judged({**scores, "mean_epistemic": np.zeros(400)}, right))
    assert "mean_epistemic" not in constant.scores
