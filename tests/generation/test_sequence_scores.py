"""Scores of one answer: closed forms, what equal particles leave, and the quantities that they estimate."""

import math
from dataclasses import replace

import pytest
import torch
from decoded_texts import at_random, decoded, with_probability

from scalabl.core.errors import UserError
from scalabl.generation.scores import SEQUENCE_SCORES, log_mean, sequence_scores, token_log_probs


def two_tokens():
    """Two particles of a vocabulary of two, that give the chosen tokens 0.5 and 0.1, then 0.3 and 0.3."""
    p = torch.tensor([[0.5, 0.3], [0.1, 0.3]], dtype=torch.float64)
    return decoded("ab", ["a", "b"], torch.stack([p, 1 - p], dim=-1).log(), [0, 0])


def entropy(*p):
    return -sum(x * math.log(x) for x in p)


def test_closed_forms():
    found = sequence_scores(two_tokens())
    first, second = math.log(0.3), math.log(0.3)
    total = [entropy(0.3, 0.7)] * 2
    aleatoric = [(entropy(0.5, 0.5) + entropy(0.1, 0.9)) / 2, entropy(0.3, 0.7)]
    epistemic = [total[0] - aleatoric[0], 0.0]
    particles = [math.log(0.15), math.log(0.03)]
    spread = (particles[0] - particles[1]) ** 2 / 4
    reverse = first - (math.log(0.5) + math.log(0.1)) / 2
    w = [0.5 / 0.3, 0.1 / 0.3]
    kl = sum(w[n] * math.log((0.5, 0.1)[n]) for n in (0, 1)) / 2 - (math.log(0.5) + math.log(0.1)) / 2
    v = [0.15 / 0.09, 0.03 / 0.09]
    expected = {
        "log_probability": first + second,
        "mean_log_probability": (first + second) / 2,
        "min_log_probability": math.log(0.3),
        "joint_log_probability": math.log((0.15 + 0.03) / 2),
        "first_token_log_probability": first,
        "first_token_entropy": total[0],
        "mean_entropy": total[0],
        "sum_entropy": 2 * total[0],
        "max_entropy": total[0],
        "mean_aleatoric": sum(aleatoric) / 2,
        "sum_aleatoric": sum(aleatoric),
        "max_aleatoric": max(aleatoric),
        "mean_epistemic": epistemic[0] / 2,
        "sum_epistemic": epistemic[0],
        "max_epistemic": epistemic[0],
        "first_token_epistemic": epistemic[0],
        "variance_log_probability": spread,
        "std_log_probability": math.sqrt(spread),
        "variance_mean_log_probability": spread / 4,
        "std_mean_log_probability": math.sqrt(spread) / 2,
        "sum_reverse_mutual_information": reverse,
        "mean_reverse_mutual_information": reverse / 2,
        "sum_pairwise_kl": kl,
        "mean_pairwise_kl": kl / 2,
        "sequence_mutual_information": sum(x * math.log(x) for x in v) / 2,
    }
    # the interval of the first token is [0.1, 0.5] and [0.5, 0.9]: beta is (1 - 0.6) / 0.8
    at = [0.1 + 0.5 * 0.4, 0.5 + 0.5 * 0.4]
    intersection = [entropy(*at), entropy(0.3, 0.7)]
    expected |= {
        "mean_intersection": sum(intersection) / 2,
        "sum_intersection": sum(intersection),
        "max_intersection": max(intersection),
    }
    assert found.keys() == expected.keys() == SEQUENCE_SCORES.keys()
    assert found == pytest.approx(expected, abs=1e-7)  # figures of tokens know log N to float32's precision


@pytest.mark.parametrize("particles", [1, 3, 7])
def test_equal_particles_leave_no_disagreement_at_all(particles):
    one = at_random(particles=1)
    same = replace(one, log_probs=one.log_probs.repeat(particles, 1))
    found, alone = sequence_scores(same), sequence_scores(one)
    for name, score in SEQUENCE_SCORES.items():
        assert not score.particles or found[name] == 0, name
        assert found[name] == pytest.approx(alone[name], abs=1e-12)


def test_the_order_of_particles_does_not_matter():
    answer = at_random(particles=5)
    other = replace(answer, log_probs=answer.log_probs[torch.tensor([3, 0, 4, 1, 2])])
    assert sequence_scores(other) == pytest.approx(sequence_scores(answer), abs=1e-12)


def test_chosen_tokens_estimate_the_divergences_of_the_distributions():
    """Averaged over every text of two tokens, as likely as it is, the chosen tokens' figures are the exact ones."""
    particles, vocabulary = 3, 4
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(particles, 2, vocabulary, generator=generator, dtype=torch.float64)
    p = logits.softmax(dim=-1)
    mean = p.mean(dim=0)
    pairs = (p[:, None] * (p[:, None] / p[None]).log()).sum(dim=(-2, -1)).mean()
    reverse = (mean * (mean / p).log()).sum(dim=(-2, -1)).mean()
    texts = [(i, j) for i in range(vocabulary) for j in range(vocabulary)]
    expected, joint = {"sum_pairwise_kl": 0.0, "sum_reverse_mutual_information": 0.0, "sum_epistemic": 0.0}, 0.0
    information = 0.0
    for i, j in texts:
        found = sequence_scores(decoded("", ["", ""], logits, [i, j]))
        for name in expected:
            expected[name] += float(mean[0, i] * mean[1, j]) * found[name]
        whole = math.exp(found["joint_log_probability"])
        joint += whole
        information += whole * found["sequence_mutual_information"]
    assert expected["sum_reverse_mutual_information"] == pytest.approx(float(reverse), abs=1e-10)
    assert expected["sum_pairwise_kl"] == pytest.approx(float(pairs), abs=1e-10)
    # the pairwise divergence is mutual information and reverse mutual information [Malinin and Gales 2021]
    assert expected["sum_pairwise_kl"] == pytest.approx(
        expected["sum_epistemic"] + expected["sum_reverse_mutual_information"], abs=1e-7
    )
    # a particle's tokens do not depend on each other here, so I[y; s] follows from entropies of 16 texts
    assert joint == pytest.approx(1)
    each = (p[:, 0, :, None] * p[:, 1, None, :]).flatten(1)
    exact = float(-(each.mean(0) * each.mean(0).log()).sum() + (each * each.log()).sum(-1).mean())
    assert information == pytest.approx(exact, abs=1e-10)


def test_the_answers_information_is_bounded_by_the_number_of_particles():
    one_only = torch.full((3, 6), -200.0)
    one_only[1] = -0.1
    answer = replace(at_random(particles=3, length=6), log_probs=one_only)
    assert sequence_scores(answer)["sequence_mutual_information"] == pytest.approx(math.log(3), abs=1e-9)


def test_an_impossible_token_leaves_every_figure_finite():
    answer = at_random(particles=3)
    broken = answer.log_probs.clone()
    broken[0, 1] = -torch.inf
    assert all(math.isfinite(value) for value in sequence_scores(replace(answer, log_probs=broken)).values())


def test_the_average_is_decodeds_own():
    answer = at_random(particles=6, length=9)
    torch.testing.assert_close(log_mean(token_log_probs(answer)), answer.average_log_probs, check_dtype=False)


def test_directions():
    """Where the particles are sure and agree, every score says so."""
    sure = torch.zeros(3, 4, 8, dtype=torch.float64)
    sure[..., 2] = 12
    sure[1, :, 2] = 11.9
    good, bad = sequence_scores(decoded("", [""] * 4, sure, [2] * 4)), sequence_scores(at_random(length=4, particles=3))
    for name, score in SEQUENCE_SCORES.items():
        assert score.uncertainty(good[name]) < score.uncertainty(bad[name]), name
        assert score.decodes(10) == 1


@pytest.mark.parametrize("shape", [(2, 0), (0, 2)])
def test_no_token_is_refused(shape):
    empty = replace(with_probability("x", [0.5]), log_probs=torch.zeros(shape), total=torch.zeros(shape[1]))
    with pytest.raises(UserError, match="at least one token"):
        sequence_scores(empty)


def test_nan_is_refused():
    answer = at_random()
    with pytest.raises(UserError, match="NaN"):
        sequence_scores(replace(answer, log_probs=answer.log_probs * torch.nan))
    with pytest.raises(UserError, match="epistemic uncertainty .* NaN"):
        sequence_scores(replace(answer, epistemic=answer.epistemic * torch.nan))
